"""What a stage must do for the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from student_trainer.collate import Batch
from student_trainer.rollout.base import Rollout

Metrics = dict[str, float]


@dataclass(frozen=True)
class Collected:
    """One step's data.

    Of several ranks each has a share of the problems; where they learn from rewards, which are judged together, each
    has all of `batch`, `rollouts`, `metrics` and `rewards`, and its share of each update in `minibatches`.

    Attributes:
        batch: what to learn from.
        rollouts: what the student wrote; empty when it wrote nothing.
        metrics: of the data, by name.
        late_metrics: of what comes while the data are learnt from, as a teacher's scores may; asked for afterwards.
        minibatches: what each optimiser update of an epoch learns from, in order; None is all of `batch` at once.
        num_epochs: passes over the minibatches.
        rewards: of the rollouts; empty where the stage has no use for them.
        full_vocabulary: this rank's part of the first rollouts, with the teacher's log-probs of the whole vocabulary,
            where due.
        is_whole: whether every rank has all of it.
    """

    batch: Batch
    rollouts: Sequence[Rollout] = ()
    metrics: Metrics = field(default_factory=dict)
    late_metrics: Callable[[], Metrics] = dict
    minibatches: Sequence[Batch] | None = None
    num_epochs: int = 1
    rewards: Sequence[float] = ()
    full_vocabulary: Batch | None = None
    is_whole: bool = False

    def updates(self) -> Iterator[Batch]:
        """The batch of each optimiser update of the step, in order; none when there is nothing to learn from."""
        whole = [self.batch] if self.batch.num_sequences else []
        for _ in range(self.num_epochs):
            yield from whole if self.minibatches is None else self.minibatches


class Stage(Protocol):
    """One way to learn. Step s depends on s and the weights alone.

    A stage that has more state than that, as PPO's critic, is also a `torch.distributed.checkpoint.stateful.Stateful`:
    every checkpoint keeps its `state_dict()`, and a resumed run gives it back before the next step.
    """

    def collect(self, step: int) -> Collected:
        """The data of step s, counted from 0; with an empty batch the step changes nothing."""
        ...

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of every completion token, [B, T]; the loop takes the token mean over each update."""
        ...

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """Monitors of one micro-batch, each a mean over its completion tokens."""
        ...

    def close(self) -> None:
        """Frees what the stage opened."""
        ...
