"""One training run: the whole config, and the tables that belong to no part of it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from student_trainer.config.base import Section
from student_trainer.config.model import ModelConfig, OptimConfig
from student_trainer.config.stage import StageConfig
from student_trainer.config.teacher import TeacherConfig
from student_trainer.config.watch import WatchConfig
from student_trainer.tasks.config import TaskConfig


class RolloutConfig(Section):
    """How the student writes."""

    samples_per_problem: PositiveInt = 1
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    """Of rollouts and of both models' log-probs in the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 the rollouts leave the student's own distribution and the loss is no longer exactly on-policy."""


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
    """Needed by opd and opsd; `--teacher URL` sets its url."""
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    rollouts_logged: Annotated[int, Field(ge=0)] = 4
    """Rollouts written to rollouts.jsonl at each step, for people to read."""

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> Self:
        if self.stage.kind != "sft" and self.teacher is None:
            raise ValueError(f"stage {self.stage.kind} needs a teacher: set teacher.url or pass --teacher URL")
        return self

    @model_validator(mode="after")
    def _loss_to_change(self) -> Self:
        if not hasattr(self.stage, "loss") and any(rule.loss for rule in self.watch.rules):
            raise ValueError(f"watch.rules: stage {self.stage.kind} has no loss that a roll-back could change")
        return self
