"""Who scores, and what the teacher is told that the student is not."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from student_trainer.config.base import Section


class TeacherConfig(Section):
    """Who scores."""

    url: str
    """grpc://HOST:PORT or http://HOST:PORT; grpcs and https for TLS. Its token, which no file of the run may hold, is
    taken from the environment variable TEACHER_TOKEN."""
    ca: str | None = None
    """The certificate authority of a grpcs or https teacher, a PEM file; None is TEACHER_CA's, or else the system's."""
    timeout_s: PositiveFloat = 300.0
    """For scoring one step's rollouts."""
    max_wait_s: Annotated[float, Field(ge=0)] = 3600.0
    """How long training waits for a teacher that is gone before the run stops, resumable."""


class SystemPrivileged(Section):
    """Privileged information: a system message."""

    kind: Literal["system"]
    text: str
    """The message, the same for every problem: a shared rule."""


class ReferencePrivileged(Section):
    """Privileged information: each problem's own reference solution."""

    kind: Literal["reference"]
    template: str = "solution"
    """One of the server's templates (see `TeacherInfo.reference_templates`)."""


class AnswerPrivileged(Section):
    """Privileged information: each problem's own answer, after the user's text."""

    kind: Literal["answer"]
    template: str = "answer"
    """One of the server's templates."""


PrivilegedConfig = Annotated[SystemPrivileged | ReferencePrivileged | AnswerPrivileged, Field(discriminator="kind")]
