"""Divergences over the full vocabulary: both log-prob arrays hold every id, so each row is a whole distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_present, check_same_shape


def reverse_kl(student_logp_BTV: Tensor, teacher_logp_BTV: Tensor) -> Tensor:
    """KL(p || q) = sum_V p log(p / q) of each position, [B, T] in nats; never below 0, and exactly 0 where p = q.

    Gradient with respect to the student's logits (at temperature 1): p_j (r_j - KL). The teacher is a constant.
    Where p = 0 the term and its gradient are 0, whatever q is. Where q = 0 < p the value is inf and so is the
    divergence: the gradient of that row is not finite, and other rows are untouched.

    Raises:
        ValueError: the shapes differ, or a teacher log-prob is missing (NaN).
    """
    check_same_shape(student_logp_BTV=student_logp_BTV, teacher_logp_BTV=teacher_logp_BTV)
    check_present(teacher_logp_BTV)
    return kl(student_logp_BTV, teacher_logp_BTV.detach())


def forward_kl(student_logp_BTV: Tensor, teacher_logp_BTV: Tensor) -> Tensor:
    """KL(q || p) = sum_V q log(q / p) of each position, [B, T] in nats; never below 0, and exactly 0 where p = q.

    Gradient with respect to the student's logits (at temperature 1): p_j - q_j. The teacher is a constant.
    Where q = 0 the term is 0, whatever p is. Where p = 0 < q the value is inf; the gradient is still p_j - q_j.

    Raises:
        ValueError: the shapes differ, or a teacher log-prob is missing (NaN).
    """
    check_same_shape(student_logp_BTV=student_logp_BTV, teacher_logp_BTV=teacher_logp_BTV)
    check_present(teacher_logp_BTV)
    return kl(teacher_logp_BTV.detach(), student_logp_BTV)


def jsd(student_logp_BTV: Tensor, teacher_logp_BTV: Tensor, beta: float) -> Tensor:
    """Jensen-Shannon divergence of each position, [B, T] in nats: beta KL(q || M) + (1 - beta) KL(p || M).

    M = beta q + (1 - beta) p, so that beta weights the teacher (GKD's convention: Agarwal et al. 2024,
    arXiv:2306.13649, section 2). It is 0 exactly where p = q, and never above log 2, whatever is impossible for either.

    Gradient with respect to the student's logits (at temperature 1): (1 - beta) p_j (s_j - sum_V p s), s = log(p / M).
    The teacher is a constant. Divided by beta (by 1 - beta) it tends to the forward KL for small beta (to the reverse
    KL near 1).

    Raises:
        ValueError: beta is not between 0 and 1, the shapes differ, or a teacher log-prob is missing (NaN).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}: at both ends the divergence is 0 everywhere")
    check_same_shape(student_logp_BTV=student_logp_BTV, teacher_logp_BTV=teacher_logp_BTV)
    check_present(teacher_logp_BTV)
    teacher_logp_BTV = teacher_logp_BTV.detach()
    mixture_BTV = _log_mixture(student_logp_BTV, teacher_logp_BTV, beta)
    return beta * kl(teacher_logp_BTV, mixture_BTV) + (1 - beta) * kl(student_logp_BTV, mixture_BTV)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the last dimension as the generalised divergence sum a log(a/b) - a + b: both must sum to 1.

    Every term is at least 0 and every term's gradient vanishes at a = b. The textbook sum reaches that zero only by
    cancellation across the vocabulary, and Adam turns the rounding noise left over into full-sized steps.
    """
    return _Kl.apply(log_a, log_b)  # pyright: ignore[reportReturnType]


class _Kl(torch.autograd.Function):
    """Gradients in closed form, a log(a/b) with respect to log a and b - a to log b: nothing is kept but the arguments,
    where autograd would keep five arrays as large."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, log_b: Tensor) -> Tensor:
        ctx.save_for_backward(log_a, log_b)
        a = log_a.exp()
        return _weighted_log_ratio(a, log_a, log_b).add_(log_b.exp().sub_(a)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        log_a, log_b = ctx.saved_tensors
        grad, (needs_a, needs_b) = grads[0][..., None], ctx.needs_input_grad
        a = log_a.exp()
        return (
            grad * _weighted_log_ratio(a, log_a, log_b) if needs_a else None,
            grad * (log_b.exp() - a) if needs_b else None,
        )


def _weighted_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a/b); 0 where a = 0, whatever b is."""
    return (log_a - log_b).mul_(a).masked_fill_(a == 0, 0.0)


def _log_mixture(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p); to the bit log p where p = q, where a logaddexp would leave its rounding."""
    higher, lower = torch.maximum(logp, logq), torch.minimum(logp, logq)
    gap = torch.where(higher > -torch.inf, lower - higher, 0.0)
    share_of_lower = torch.where(logp < logq, 1 - beta, beta)
    return higher + torch.log1p(share_of_lower * torch.expm1(gap))
