"""Losses of the sampled token alone, y ~ p: one teacher log-prob a token. r = log p(y) - log q(y), in nats.

One sample is an estimate: the gradients below are expectations over y ~ p, with respect to the student's logits at
temperature 1. A y that was drawn from another distribution needs `importance_weights`. Names after Schulman,
"Approximating KL Divergence" (2020). k1, the bare r, is no loss: the expectation of its gradient is sum_V p (d log p) =
0, whatever the teacher says; it is a metric. Nor is an advantage that is the same for every y of a position, such as a
top-K KL: its expected gradient is 0 for the same reason. Here the advantage is the token's own.

All return [B, T], 0 outside the mask, and raise ValueError when shapes differ or a teacher log-prob is missing (NaN)
inside it. r = 0 has no gradient, to the bit. A token impossible for the teacher has r = inf, and no finite gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_present, check_same_shape


def policy_gradient(logp_BT: Tensor, teacher_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The surrogate of -A log p(y), A = -r a constant: its gradient is r d log p(y), in expectation the reverse KL's.

    The value is r itself, an unbiased estimate of KL(p || q) that can be negative.

    Args:
        logp_BT: log p of the sampled tokens.
        teacher_logp_BT: log q of the same tokens; a constant.
        mask_BT: bool, the tokens that count.
    """
    r_BT = _log_ratio(logp_BT, teacher_logp_BT, mask_BT)
    return r_BT.detach() * (1 + (r_BT - r_BT.detach()))


def k2(logp_BT: Tensor, teacher_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """r^2 / 2: the gradient is r d log p(y), in expectation the reverse KL's. Arguments as for `policy_gradient`."""
    return _log_ratio(logp_BT, teacher_logp_BT, mask_BT).square() / 2


def k3(logp_BT: Tensor, teacher_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): in expectation KL(p || q) in value and the *forward* KL's gradient, p_j - q_j.

    Arguments as for `policy_gradient`. Where q is over e^88 times p, float32 overflows: inf.
    """
    r_BT = _log_ratio(logp_BT, teacher_logp_BT, mask_BT)
    return torch.expm1(-r_BT) + r_BT


def importance_weights(
    logp_BT: Tensor, behaviour_logp_BT: Tensor, mode: Literal["truncated", "clipped"], limit: float
) -> Tensor:
    """w = p(y) / mu(y) of each token that was drawn from mu, a constant [B, T] to multiply its loss with.

    "truncated" keeps w <= limit (Ionides 2008, "Truncated Importance Sampling"), "clipped" keeps 1 / limit <= w <=
    limit: both trade variance for bias. Unlimited, E_mu[w g] = E_p[g]. A missing log-prob stays NaN.

    Args:
        logp_BT: log p of the sampled tokens, now.
        behaviour_logp_BT: log mu of the same tokens, when they were drawn: temperature, nucleus and all.

    Raises:
        ValueError: the shapes differ, or the limit is below 1.
    """
    check_same_shape(logp_BT=logp_BT, behaviour_logp_BT=behaviour_logp_BT)
    if not limit >= 1:
        raise ValueError(f"the limit of an importance weight must be at least 1, got {limit}")
    w_BT = (logp_BT.detach() - behaviour_logp_BT).exp()
    return w_BT.clamp(min=1 / limit if mode == "clipped" else 0.0, max=limit)


def _log_ratio(logp_BT: Tensor, teacher_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    check_same_shape(logp_BT=logp_BT, teacher_logp_BT=teacher_logp_BT, mask_BT=mask_BT)
    check_present(teacher_logp_BT, mask_BT)
    return torch.where(mask_BT, logp_BT - teacher_logp_BT.detach(), 0.0)
