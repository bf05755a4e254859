"""What is learnt from: one table a stage, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from student_trainer.config.base import Section
from student_trainer.config.loss import SAMPLED, LossConfig
from student_trainer.config.policy import GrpoStage, PpoStage
from student_trainer.config.privileged import PrivilegedConfig


class TracesConfig(Section):
    """Completions that the teacher writes before the first step; those that the task rewards are learnt."""

    samples_per_problem: PositiveInt = 1
    num_problems: PositiveInt | None = None
    """The first so many of the task's training problems; None is all of them."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt | None = None
    """None takes `rollout.max_new_tokens`. A trace that reaches the budget has no end and is not learnt."""
    min_reward: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The task's reward from which on a trace is learnt; 0 takes every one that ended."""
    privileged: PrivilegedConfig | None = None
    """What the teacher sees as it writes and the student never does."""


class SftStage(Section):
    """Supervised fine-tuning on the problems' references, or on what a teacher wrote."""

    kind: Literal["sft"]
    traces: TracesConfig | None = None
    """The teacher's own traces take the place of the references; `teacher.url` is asked for them once."""
    packing: bool = False
    """Whether texts stand one after the other in a row of the forward pass, where padding would be, each with its own
    positions and attention. The loss is the same; a micro-batch has as many texts in fewer rows."""


class DistillationStage(Section):
    """What every stage has that learns from a teacher's scores."""

    loss: LossConfig = LossConfig()
    teacher_written: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The chance a step that the teacher writes its completions, and the student learns from those: 1 - lambda of GKD
    (arXiv:2306.13649). TEACHER_TOKEN needs the scope generate. Not for losses that need the student's own samples."""

    @model_validator(mode="before")
    @classmethod
    def _no_lambda(cls, table: Any) -> Any:
        if isinstance(table, dict) and "lambda" in table:
            raise ValueError(
                "lambda: GKD's lambda is the share of steps that the student writes (arXiv:2306.13649); name the "
                "teacher's share instead, teacher_written = 1 - lambda"
            )
        return table

    @model_validator(mode="after")
    def _teacher_writes_for_losses_that_can_take_it(self) -> Self:
        refuse_teacher_written(self.teacher_written, self.loss)
        return self


def refuse_teacher_written(share: float, loss: LossConfig) -> None:
    """Raises ValueError for a loss that is right in expectation over the student's own samples alone."""
    if share > 0 and loss.kind in SAMPLED:
        raise ValueError(
            f"teacher_written is {share:g}, and loss.kind {loss.kind} needs tokens that the student itself sampled, "
            "weighted by importance or not: set teacher_written to 0, or take a loss that compares distributions, such "
            "as stop_gradient_reverse_kl"
        )


class OpdStage(DistillationStage):
    """On-policy distillation from a teacher."""

    kind: Literal["opd"]
    privileged: PrivilegedConfig | None = None
    """What the teacher sees and the student does not; optional in OPD."""


class OpsdStage(DistillationStage):
    """On-policy self-distillation: the teacher is the student's own earlier weights, told more."""

    kind: Literal["opsd"]
    privileged: PrivilegedConfig
    """What the teacher sees and the student does not; without it teacher and student would be equal."""
    teacher: Literal["frozen", "live", "ema"] = "frozen"
    """Which of the student's weights teach: those that `teacher.url` serves as it is, the start's (`frozen`), those of
    each step (`live`), or their running mean (`ema`). The last two are sent to `teacher.url` before each step, which
    must serve the student's own model; TEACHER_TOKEN needs the scope admin there."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """d of the running mean, which after each step is d * mean + (1 - d) * weights; None is 0.99. For `ema` alone."""

    @model_validator(mode="after")
    def _decay_of_a_mean(self) -> Self:
        if self.ema_decay is not None and self.teacher != "ema":
            raise ValueError(
                f'ema_decay is of teacher = "ema" alone, and teacher is "{self.teacher}": leave ema_decay out'
            )
        return self


StageConfig = Annotated[SftStage | OpdStage | OpsdStage | GrpoStage | PpoStage, Field(discriminator="kind")]
