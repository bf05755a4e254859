"""One training run: the whole config, and the tables that belong to no part of it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from student_trainer.config.base import ConfigError, Section
from student_trainer.config.model import ModelConfig, OptimConfig
from student_trainer.config.privileged import PrivilegedConfig, TextPrivileged
from student_trainer.config.stage import OpdStage, OpsdStage, SftStage, StageConfig, refuse_teacher_written
from student_trainer.config.teacher import TeacherConfig, WeightsBy
from student_trainer.config.tracking import TrackingConfig
from student_trainer.config.watch import WatchConfig
from student_trainer.tasks.config import TaskConfig

GROUP_SIZE = 8
"""Of GRPO, where none is given: DeepSeekMath (arXiv:2402.03300) takes 64, most recipes since take 8 or 16."""


class RolloutConfig(Section):
    """How the student writes."""

    samples_per_problem: PositiveInt | None = None
    """None is 1, and 8 in grpo, which compares the samples of a problem."""
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    """Of rollouts and of both models' log-probs in the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 the rollouts leave the student's own distribution and the loss is no longer exactly on-policy."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between the weights that wrote a rollout and those that learn from it, at most. 0 is on-policy;
    from 1 on, rollouts are scored while the step before is learnt, and stale ones are weighted."""
    url: str | None = None
    """A teacher server of the student's own model that writes the rollouts, with weights pushed to it before each step;
    TEACHER_TOKEN needs the scopes generate, score and admin there. None writes them in this process."""
    weights_by: WeightsBy = "stream"
    """How weights get to `url`; see `teacher.weights_by`."""
    timeout_s: PositiveFloat = 300.0
    """For one push of weights to `url`, and for one step's rollouts from there."""


class EvalConfig(Section):
    """Greedy accuracy on held-out problems."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """0 evaluates at the end only."""
    num_problems: PositiveInt = 500
    max_new_tokens: PositiveInt | None = None
    """None takes the rollouts' own budget."""
    batch_size: PositiveInt = 128


class CheckpointConfig(Section):
    """What is kept on disk."""

    every_steps: PositiveInt = 100
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""


class TrainConfig(Section):
    """One training run."""

    run: str
    """The run folder; a run that finds its own config there goes on from its last checkpoint."""
    steps: PositiveInt
    """Optimiser steps."""
    problems_per_step: PositiveInt = 64
    """Problems behind one optimiser step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the problems' order and of every sample; equal configs and seeds give equal runs."""
    model: ModelConfig
    task: TaskConfig
    stage: StageConfig
    teacher: TeacherConfig | None = None
    """Needed by opd, opsd and an sft with `stage.traces`; `--teacher URL` sets its url."""
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    watch: WatchConfig = WatchConfig()
    rollouts_logged: Annotated[int, Field(ge=0)] = 4
    """Rollouts written to rollouts.jsonl at each step, for people to read."""

    @property
    def num_samples(self) -> int:
        """Completions of each problem."""
        return self.rollout.samples_per_problem or (GROUP_SIZE if self.stage.kind == "grpo" else 1)

    @property
    def privileged(self) -> PrivilegedConfig | None:
        """What the teacher is told that the student is not, with the task's text where the stage has none."""
        match self.stage:
            case OpdStage() | OpsdStage():
                told = self.stage.privileged
            case SftStage(traces=traces) if traces:
                told = traces.privileged
            case _:
                told = None
        if isinstance(told, TextPrivileged) and told.text is None:
            return told.model_copy(update={"text": self.task.privileged_text})
        return told

    def check_ranks(self, num_ranks: int) -> None:
        """Refuses what several processes, started by torchrun, cannot do together.

        Raises:
            ConfigError: the message says what to change.
        """
        if self.problems_per_step < num_ranks:
            raise ConfigError(
                f"problems_per_step is {self.problems_per_step}, fewer than the {num_ranks} processes: raise it, or "
                "start fewer"
            )

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> Self:
        is_needed = self.stage.kind in ("opd", "opsd") or (isinstance(self.stage, SftStage) and self.stage.traces)
        if is_needed and self.teacher is None:
            which = "stage.traces" if self.stage.kind == "sft" else f"stage {self.stage.kind}"
            raise ValueError(f"{which} needs a teacher: set teacher.url or pass --teacher URL")
        return self

    @model_validator(mode="after")
    def _privileged_text_where_needed(self) -> Self:
        if isinstance(self.privileged, TextPrivileged) and self.privileged.text is None:
            raise ValueError(
                "privileged information without a text: set the text of its table, or task.privileged_text"
            )
        return self

    @model_validator(mode="after")
    def _writer_is_not_teacher(self) -> Self:
        if self.teacher is not None and self.rollout.url == self.teacher.url:
            raise ValueError(
                f"rollout.url and teacher.url are both {self.teacher.url}: the server that writes is sent new weights "
                "at every step, and a teacher must stay as it is; start another server for one of them"
            )
        return self

    @model_validator(mode="after")
    def _staleness_where_it_counts(self) -> Self:
        if self.rollout.max_staleness and self.stage.kind not in ("opd", "opsd"):
            raise ValueError(
                f"rollout.max_staleness is {self.rollout.max_staleness}, and stage {self.stage.kind} collects nothing "
                f"ahead: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _moving_teacher_is_of_the_step(self) -> Self:
        if isinstance(self.stage, OpsdStage) and self.stage.teacher != "frozen" and self.rollout.max_staleness:
            raise ValueError(
                f'stage.teacher is "{self.stage.teacher}" and rollout.max_staleness {self.rollout.max_staleness}: '
                "a teacher that moves has the weights of one step, and can score nothing ahead; set max_staleness to 0"
            )
        return self

    @model_validator(mode="after")
    def _group_where_needed(self) -> Self:
        if self.stage.kind == "grpo" and self.num_samples < 2:
            raise ValueError(
                f"stage grpo compares the samples of a problem, and rollout.samples_per_problem is "
                f"{self.num_samples}: set it to 2 or more, for example 8"
            )
        return self

    @model_validator(mode="after")
    def _loss_to_change(self) -> Self:
        if not hasattr(self.stage, "loss") and any(rule.loss for rule in self.watch.rules):
            raise ValueError(f"watch.rules: stage {self.stage.kind} has no loss that a roll-back could change")
        if isinstance(self.stage, OpdStage | OpsdStage):
            for loss in (rule.loss for rule in self.watch.rules if rule.loss):
                refuse_teacher_written(self.stage.teacher_written, loss)
        return self
