"""What the stages share that learn from rewards: who acts, what they stay close to, and the surrogate of the loss."""

from __future__ import annotations

import dataclasses

import torch

from student_trainer.collate import Batch
from student_trainer.config import PolicyStage
from student_trainer.stages.actor import Actor, Experience
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.surrogate import Reference, Surrogate


class Policy:
    """An actor whose tokens' advantages are learnt by a surrogate; how they are judged is its subclasses'.

    Args:
        reference: None where nothing is to stay close to it.
    """

    def __init__(self, actor: Actor, surrogate: Surrogate, reference: Reference | None) -> None:
        self._actor = actor
        self._surrogate = surrogate
        self._reference = reference

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See `Surrogate.loss`."""
        return self._surrogate.loss(logits_BTV, batch)

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """See `Surrogate.watch`."""
        return self._surrogate.watch(logits_BTV, batch)

    def close(self) -> None:
        """Closes the connection to a remote sampler."""
        self._actor.close()

    def _with_reference(self, batch: Batch) -> Batch:
        """`batch` with the reference's log-probs, where there is one."""
        if self._reference is None or not batch.num_sequences:
            return batch
        return dataclasses.replace(batch, reference_logp_BT=self._reference.log_probs(batch))


def collected(config: PolicyStage, batch: Batch, experience: Experience, metrics: Metrics) -> Collected:
    """The step's data, of which `batch` is learnt; `metrics` come beside those of the experience."""
    return Collected(
        batch,
        experience.rollouts,
        experience.metrics | metrics,
        minibatches=batch.shares(config.num_minibatches),
        num_epochs=config.num_epochs,
        rewards=experience.rewards,
        is_whole=True,
    )
