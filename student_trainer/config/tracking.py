"""Where a run's metrics go besides its folder."""

from __future__ import annotations

from typing import Literal

from student_trainer.config.base import Section

SinkName = Literal["tensorboard", "wandb", "trackio"]
"""Each is the name of the package that it needs; the extra `tracking` installs all three."""


class TrackingConfig(Section):
    """Where metrics go besides the run folder, which stays the truth."""

    sinks: tuple[SinkName, ...] = ()
    """Any of "tensorboard" (files in the run folder), "wandb", "trackio"; a resumed run goes on in the same place.
    What a sink itself reads from the environment holds here too: WANDB_MODE, TRACKIO_SPACE_ID and so on."""
    project: str = "opd"
    """The project's name in wandb and trackio."""
