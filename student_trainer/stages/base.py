"""What a stage must do for the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from student_trainer.collate import Batch
from student_trainer.rollout.base import Rollout

Metrics = dict[str, float]


@dataclass(frozen=True)
class Collected:
    """One step's data.

    Attributes:
        batch: what to learn from.
        rollouts: what the student wrote; empty when it wrote nothing.
        metrics: of the data, by name.
        num_minibatches, num_epochs: how many optimiser updates it is for; see `Batch.updates`.
        rewards: of the rollouts; empty where the stage has no use for them.
        full_vocabulary: the first rollouts with the teacher's log-probs of the whole vocabulary, where due.
    """

    batch: Batch
    rollouts: Sequence[Rollout] = ()
    metrics: Metrics = field(default_factory=dict)
    num_minibatches: int = 1
    num_epochs: int = 1
    rewards: Sequence[float] = ()
    full_vocabulary: Batch | None = None

    def updates(self) -> Iterator[Batch]:
        """The batch of each optimiser update of the step, in order; none when there is nothing to learn from."""
        return self.batch.updates(self.num_minibatches, self.num_epochs)


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
