"""What a stage must do for the loop."""

from __future__ import annotations

from collections.abc import Sequence
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
        rewards: of the rollouts; empty where the stage has no use for them.
        full_vocabulary: the first rollouts with the teacher's log-probs of the whole vocabulary, where due.
    """

    batch: Batch
    rollouts: Sequence[Rollout] = ()
    metrics: Metrics = field(default_factory=dict)
    rewards: Sequence[float] = ()
    full_vocabulary: Batch | None = None


class Stage(Protocol):
    """One way to learn. A stage holds no state that a resumed run would miss: step s depends on s and the weights."""

    def collect(self, step: int) -> Collected:
        """The data of step s, counted from 0."""
        ...

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of every completion token, [B, T]; the loop takes the token mean over the whole step."""
        ...

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """Monitors of one micro-batch, each a mean over its completion tokens."""
        ...

    def close(self) -> None:
        """Frees what the stage opened."""
        ...
