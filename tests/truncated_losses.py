"""Every truncated loss over both log-probs of the whole vocabulary, and the textbook's closed form of it.

p, q student and teacher; m = 1 on the support; P, Q the masses on it; r = log p - log q; z the student's logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from student_trainer.losses import (
    Support,
    biased_reverse_kl,
    gather,
    log_tail,
    renormalised_forward_kl,
    renormalised_reverse_kl,
    stop_gradient_reverse_kl,
    tail_forward_kl,
    tail_reverse_kl,
)

VOCAB = 9


def of_support(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Support], Tensor]:
    """A loss of (log p, log q, support), both over the whole vocabulary, from one of the support's entries."""
    return lambda logp, logq, support: loss(gather(logp, support), gather(logq, support), support.mask_BTS)


def with_tail(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Support], Tensor]:
    return lambda logp, logq, support: loss(
        gather(logp, support), log_tail(logp, support), gather(logq, support), support.mask_BTS
    )


FUNCTIONS = {
    "stop_gradient": stop_gradient_reverse_kl,
    "biased": biased_reverse_kl,
    "renormalised_reverse": renormalised_reverse_kl,
    "renormalised_forward": renormalised_forward_kl,
    "tail_reverse": tail_reverse_kl,
    "tail_forward": tail_forward_kl,
}
"""Of a support's entries, the tails with the student's log-mass outside beside them."""

LOSSES = {name: (with_tail if "tail" in name else of_support)(loss) for name, loss in FUNCTIONS.items()}


def closed_form(name: str, p: Tensor, q: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Value [B, T] and gradient with respect to the logits [B, T, V], from the textbook's formulas."""
    P, Q = (m * p).sum(-1, keepdim=True), (m * q).sum(-1, keepdim=True)
    r = (p / q).log()
    L = (m * p * r).sum(-1, keepdim=True)
    tail_p, tail_q = ((1 - m) * p).sum(-1, keepdim=True), ((1 - m) * q).sum(-1, keepdim=True)
    r_tail = torch.where(tail_p > 0, (tail_p / tail_q).log(), 0.0)
    match name:
        case "stop_gradient":
            return L[..., 0], p * (m * r - L)
        case "biased":
            return L[..., 0], p * (m * (r + 1) - L - P)
        case "renormalised_reverse":
            r_bar = r - (P / Q).log()
            L = (m * p / P * r_bar).sum(-1, keepdim=True)
            return L[..., 0], m * p / P * (r_bar - L)
        case "renormalised_forward":
            value = (m * q / Q * ((P / Q).log() - r)).sum(-1)
            return value, m * (p / P - q / Q)
        case "tail_reverse":
            L = L + tail_p * r_tail
            return L[..., 0], p * (m * r + (1 - m) * r_tail - L)
        case "tail_forward":
            value = -(m * q * r).sum(-1) - (tail_q * r_tail)[..., 0]
            off = torch.where(tail_p > 0, tail_q * p / tail_p, 0.0)
            return value, p - m * q - (1 - m) * off
    raise AssertionError(name)


def logits_pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 2, 3, VOCAB, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def members(support: Support, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_add(-1, support.ids_BTS.clamp(min=0), support.mask_BTS.to(like.dtype))


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor([list(rows)], dtype=torch.float64)
