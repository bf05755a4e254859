"""From a loss's config to what it asks of a teacher, its value at each token, and its monitors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import assert_never

import torch

from student_trainer import losses
from student_trainer.collate import Batch
from student_trainer.config import LossConfig
from student_trainer.config.loss import FULL_VOCABULARY, SAMPLED
from student_trainer.scoring import Wanted
from student_trainer.stages.base import Metrics
from student_trainer.stages.watch import watch_tokens

DEFAULT_BETA = 0.5
"""Of jsd where the config leaves it out: the symmetric Jensen-Shannon divergence."""


class Objective:
    """A distillation loss between the student's logits and a teacher's scores, at one temperature.

    Args:
        config: which loss, over which support.
        vocab_size: V, the width of the student's output.
        temperature: of both models' log-probs.
        eos_token_ids: what ends a completion; watched.

    Attributes:
        wanted: what the loss and its monitors need of the teacher.
        top_k: K, how many of its own most likely ids the student keeps of each position.
    """

    def __init__(
        self, config: LossConfig, vocab_size: int, temperature: float, *, eos_token_ids: Sequence[int] = ()
    ) -> None:
        if config.kind == "biased_reverse_kl":
            warnings.warn(
                "biased_reverse_kl is for study: differentiating through the log-ratio adds the gradient of the "
                "student's mass P on the support, so that descent stops at p = q / e; P falls to Q / e and, with EOS "
                "in the support, completions grow by a factor up to e (student_trainer.losses.biased_reverse_kl); "
                "stop_gradient_reverse_kl is the same loss without the bias",
                stacklevel=2,
            )
        self._config = config
        self._temperature = temperature
        self._eos_token_ids = eos_token_ids
        self.top_k = min(config.top_k, vocab_size)
        # The teacher's list is asked for whatever the loss: the overlap of the two lists is the first monitor. It also
        # answers for every id of the intersection and of the teacher's own support.
        needs_candidates = config.kind not in FULL_VOCABULARY | SAMPLED and config.support in ("student", "union")
        self.wanted = Wanted(
            teacher_top_k=self.top_k,
            student_top_k=self.top_k if needs_candidates else 0,
            vocab_size=vocab_size if config.kind in FULL_VOCABULARY else 0,
            temperature=temperature,
            entropy=True,
        )

    @property
    def _is_sampled(self) -> bool:
        return self._config.kind in SAMPLED

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each token, [B, T]."""
        logp_BTV = losses.log_probs(logits_BTV, self._temperature)
        match self._config.kind:
            case "reverse_kl":
                return losses.reverse_kl(logp_BTV, self._teacher_logp_BTV(batch))
            case "forward_kl":
                return losses.forward_kl(logp_BTV, self._teacher_logp_BTV(batch))
            case "jsd":
                return losses.jsd(logp_BTV, self._teacher_logp_BTV(batch), self._config.beta or DEFAULT_BETA)
            case "policy_gradient" | "k2" | "k3":
                return self._sampled(logp_BTV, batch)
            case _:
                return self._truncated(logp_BTV, batch)

    @torch.no_grad()
    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """Monitors of some tokens, those of the support but for a sampled loss, which has none; see `watch_tokens`."""
        logp_BTV = losses.log_probs(logits_BTV, self._temperature)
        paired = None if self._is_sampled else self._paired(batch)
        return watch_tokens(logp_BTV, batch, paired, top_k=self.top_k, eos_token_ids=self._eos_token_ids)

    def _sampled(self, logp_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        logp_BT, teacher_logp_BT = _sampled_logp(logp_BTV, batch), _present(batch.teacher_logp_BT)
        match self._config.kind:
            case "policy_gradient":
                loss_BT = losses.policy_gradient(logp_BT, teacher_logp_BT, batch.mask_BT)
            case "k2":
                loss_BT = losses.k2(logp_BT, teacher_logp_BT, batch.mask_BT)
            case _:
                loss_BT = losses.k3(logp_BT, teacher_logp_BT, batch.mask_BT)
        if self._config.importance is None:
            return loss_BT
        return loss_BT * losses.importance_weights(
            logp_BT, _present(batch.sampled_logp_BT), self._config.importance, self._config.importance_limit
        )

    def _truncated(self, logp_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        support, teacher_logp_BTS = self._paired(batch)
        student_logp_BTS, mask_BTS = losses.gather(logp_BTV, support), support.mask_BTS
        match self._config.kind:
            case "stop_gradient_reverse_kl":
                return losses.stop_gradient_reverse_kl(student_logp_BTS, teacher_logp_BTS, mask_BTS)
            case "biased_reverse_kl":
                return losses.biased_reverse_kl(student_logp_BTS, teacher_logp_BTS, mask_BTS)
            case "renormalised_reverse_kl":
                return losses.renormalised_reverse_kl(student_logp_BTS, teacher_logp_BTS, mask_BTS)
            case "renormalised_forward_kl":
                return losses.renormalised_forward_kl(student_logp_BTS, teacher_logp_BTS, mask_BTS)
            case "tail_reverse_kl":
                tail_BT = losses.log_tail(logp_BTV, support)
                return losses.tail_reverse_kl(student_logp_BTS, tail_BT, teacher_logp_BTS, mask_BTS)
            case "tail_forward_kl":
                tail_BT = losses.log_tail(logp_BTV, support)
                return losses.tail_forward_kl(student_logp_BTS, tail_BT, teacher_logp_BTS, mask_BTS)
            case _:
                raise AssertionError(f"{self._config.kind} has no support")

    def _paired(self, batch: Batch) -> tuple[losses.Support, torch.Tensor]:
        """The support, and the teacher's log-probs on it, [B, T, S]."""
        student_top_BTK = _present(batch.student_top_BTK)
        teacher_top_BTK = _present(batch.teacher_top_BTK)
        match self._config.support:
            case "student":
                support = losses.student_support(student_top_BTK)
            case "teacher":
                support = losses.teacher_support(teacher_top_BTK[..., : self.top_k])
            case "intersection":
                support = losses.intersection_support(student_top_BTK, teacher_top_BTK[..., : self.top_k])
            case "union":
                support = losses.union_support(student_top_BTK, teacher_top_BTK[..., : self.top_k])
            case _:
                assert_never(self._config.support)
        if self._config.kind in FULL_VOCABULARY:
            return support, losses.gather(self._teacher_logp_BTV(batch), support)
        teacher_logp_BTS = losses.align(
            support,
            student_top_BTK[..., : self.wanted.student_top_k],
            _present(batch.teacher_candidate_logp_BTM),
            teacher_top_BTK,
            _present(batch.teacher_top_logp_BTK),
        )
        return support, teacher_logp_BTS

    def _teacher_logp_BTV(self, batch: Batch) -> torch.Tensor:
        logp_BTV = _present(batch.teacher_candidate_logp_BTM)
        if batch.mask_BT.all():
            return logp_BTV
        # Finite on padding, so that a loss has no NaN to leak.
        return logp_BTV.masked_fill(~batch.mask_BT[..., None], -math.log(logp_BTV.shape[-1]))


def _sampled_logp(logp_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    return logp_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0]


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a distillation batch carries the teacher's scores"
    return tensor
