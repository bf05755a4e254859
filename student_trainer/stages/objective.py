"""From a loss's config to what it asks of a teacher, its value at each token, and its monitors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch

from student_trainer import losses
from student_trainer.collate import Batch
from student_trainer.config import LossConfig
from student_trainer.scoring import Wanted
from student_trainer.stages.base import Metrics
from student_trainer.stages.watch import watch_tokens


class Objective:
    """A distillation loss between the student's logits and a teacher's scores, at one temperature.

    Args:
        config: which loss, over which support.
        vocab_size: V, the width of the student's output.
        temperature: of both models' log-probs.
        eos_token_ids: what ends a completion; watched.
    """

    def __init__(
        self, config: LossConfig, vocab_size: int, temperature: float, *, eos_token_ids: Sequence[int] = ()
    ) -> None:
        self._config = config
        self._temperature = temperature
        self._eos_token_ids = eos_token_ids
        self._top_k = min(config.top_k, vocab_size)
        is_truncated = config.kind == "stop_gradient_reverse_kl"
        # Both lists are asked for whatever the support: the overlap of the two is the first monitor.
        self.wanted = Wanted(
            teacher_top_k=self._top_k if is_truncated else vocab_size, student_top_k=self._top_k, entropy=True
        )

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each token, [B, T]."""
        logp_BTV = losses.log_probs(logits_BTV, self._temperature)
        match self._config.kind:
            case "stop_gradient_reverse_kl":
                support, teacher_logp_BTS = self._paired(batch)
                student_logp_BTS = losses.gather(logp_BTV, support)
                return losses.stop_gradient_reverse_kl(student_logp_BTS, teacher_logp_BTS, support.mask_BTS)
            case "reverse_kl":
                return losses.reverse_kl(logp_BTV, self._teacher_logp_BTV(batch))
            case "forward_kl":
                return losses.forward_kl(logp_BTV, self._teacher_logp_BTV(batch))
            case _:
                assert_never(self._config.kind)

    @torch.no_grad()
    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """Monitors of one micro-batch; see `watch_tokens`."""
        support, teacher_logp_BTS = self._paired(batch)
        return watch_tokens(
            losses.log_probs(logits_BTV, self._temperature),
            batch,
            support,
            teacher_logp_BTS,
            top_k=self._top_k,
            eos_token_ids=self._eos_token_ids,
        )

    def _paired(self, batch: Batch) -> tuple[losses.Support, torch.Tensor]:
        """The support, and the teacher's log-probs on it, [B, T, S]."""
        student_top_BTK = _present(batch.student_top_BTK)
        teacher_top_BTK = _present(batch.teacher_top_BTK)
        match self._config.support:
            case "student":
                support = losses.student_support(student_top_BTK)
            case "teacher":
                support = losses.teacher_support(teacher_top_BTK[..., : self._top_k])
            case "union":
                support = losses.union_support(student_top_BTK, teacher_top_BTK[..., : self._top_k])
            case _:
                assert_never(self._config.support)
        teacher_logp_BTS = losses.align(
            support,
            student_top_BTK,
            _present(batch.teacher_candidate_logp_BTM),
            teacher_top_BTK,
            _present(batch.teacher_top_logp_BTK),
        )
        return support, teacher_logp_BTS

    def _teacher_logp_BTV(self, batch: Batch) -> torch.Tensor:
        return losses.full_vocabulary(
            _present(batch.teacher_top_BTK), _present(batch.teacher_top_logp_BTK), batch.mask_BT
        )


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "a distillation batch carries the teacher's scores"
    return tensor
