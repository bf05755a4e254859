"""Who scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from student_trainer.config.base import Section

WeightsBy = Literal["stream", "transfer"]
"""How weights get to a server: inside the call, or broadcast to its engine's workers (`--weights-transfer` there)."""


class TeacherConfig(Section):
    """Who scores."""

    url: str
    """grpc://HOST:PORT or http://HOST:PORT; grpcs and https for TLS. Its token, which no file of the run may hold, is
    taken from the environment variable TEACHER_TOKEN, or from the file that TEACHER_TOKEN_FILE names."""
    name: str | None = None
    """Which of the server's teachers, for example an adapter that it serves; None is its first."""
    ca: str | None = None
    """The certificate authority of a grpcs or https teacher, a PEM file; None is TEACHER_CA's, or else the system's."""
    weights_by: WeightsBy = "stream"
    """How the weights of a moving opsd teacher get to it. "transfer" broadcasts them straight into the workers of its
    engine, over what the server's `--weights-transfer` says: gloo, or nccl from GPU to GPU."""
    timeout_s: PositiveFloat = 300.0
    """For scoring one step's rollouts."""
    max_wait_s: Annotated[float, Field(ge=0)] = 3600.0
    """How long training waits for a teacher that is gone before the run stops, resumable."""
