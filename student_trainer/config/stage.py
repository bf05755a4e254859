"""What is learnt from: one table a stage, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from student_trainer.config.base import Section
from student_trainer.config.loss import LossConfig
from student_trainer.config.policy import GrpoStage, PpoStage
from student_trainer.config.privileged import PrivilegedConfig


class SftStage(Section):
    """Supervised fine-tuning on the problems' references."""

    kind: Literal["sft"]


class OpdStage(Section):
    """On-policy distillation from a teacher."""

    kind: Literal["opd"]
    loss: LossConfig = LossConfig()
    privileged: PrivilegedConfig | None = None
    """What the teacher sees and the student does not; optional in OPD."""


class OpsdStage(Section):
    """On-policy self-distillation: the teacher is the student's own earlier weights, told more."""

    kind: Literal["opsd"]
    privileged: PrivilegedConfig
    """What the teacher sees and the student does not; without it teacher and student would be equal."""
    loss: LossConfig = LossConfig()


StageConfig = Annotated[SftStage | OpdStage | OpsdStage | GrpoStage | PpoStage, Field(discriminator="kind")]
