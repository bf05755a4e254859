"""From a policy stage's config to the loss of each token and its monitors; and the reference it may stay close to."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel

from student_trainer import losses, monitor
from student_trainer.collate import Batch
from student_trainer.distributed import gathered
from student_trainer.in_step import by_shares
from student_trainer.losses import policy
from student_trainer.sequence_logp import sequence_logp
from student_trainer.stages.base import Metrics


class Surrogate:
    """PPO's clipped surrogate, and the divergence from a reference where the batch has the reference's log-probs.

    Args:
        clip_low: see `losses.policy.clipped_surrogate`.
        clip_high: likewise.
        kl_coefficient: of the divergence from the reference.
        temperature: of sampling, and so of every log-prob.
    """

    def __init__(self, *, clip_low: float, clip_high: float, kl_coefficient: float, temperature: float) -> None:
        self._clip_low = clip_low
        self._clip_high = clip_high
        self._kl_coefficient = kl_coefficient
        self._temperature = temperature

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each token, [B, T]."""
        assert batch.sampled_logp_BT is not None
        assert batch.advantage_BT is not None
        logp_BT = _sampled(losses.log_probs(logits_BTV, self._temperature), batch)
        loss_BT = policy.clipped_surrogate(
            logp_BT,
            batch.sampled_logp_BT,
            batch.advantage_BT,
            batch.mask_BT,
            clip_low=self._clip_low,
            clip_high=self._clip_high,
        )
        if self._kl_coefficient == 0 or batch.reference_logp_BT is None:
            return loss_BT
        return loss_BT + self._kl_coefficient * policy.reference_kl(logp_BT, batch.reference_logp_BT, batch.mask_BT)

    @torch.no_grad()
    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """Share of clipped tokens, distance from the weights that sampled and from the reference, entropy."""
        assert batch.sampled_logp_BT is not None
        assert batch.advantage_BT is not None
        logp_BTV = losses.log_probs(logits_BTV, self._temperature)
        logp_BT = _sampled(logp_BTV, batch)
        clipped_BT = policy.is_clipped(
            logp_BT, batch.sampled_logp_BT, batch.advantage_BT, clip_low=self._clip_low, clip_high=self._clip_high
        )
        metrics = {
            "clip_fraction": float(losses.token_mean(clipped_BT.float(), batch.mask_BT)),
            "sampler_kl": float(
                losses.token_mean(policy.reference_kl(logp_BT, batch.sampled_logp_BT, batch.mask_BT), batch.mask_BT)
            ),
            "entropy": float(losses.token_mean(monitor.entropy(logp_BTV.exp(), logp_BTV), batch.mask_BT)),
        }
        if batch.reference_logp_BT is not None:
            divergence_BT = policy.reference_kl(logp_BT, batch.reference_logp_BT, batch.mask_BT)
            metrics["reference_kl"] = float(losses.token_mean(divergence_BT, batch.mask_BT))
        return metrics


class Reference:
    """A frozen model: how likely it finds each token that the student wrote."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, micro_batch_size: int) -> None:
        self._model = model.requires_grad_(False).eval()
        self._temperature = temperature
        self._micro_batch_size = micro_batch_size

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """See `sequence_logp`; of a batch that all ranks have."""
        of_batch = partial(
            sequence_logp, self._model, temperature=self._temperature, micro_batch_size=self._micro_batch_size
        )
        with gathered(self._model):
            return by_shares(of_batch, batch)


def _sampled(logp_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    return logp_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0]
