"""Losses truncated to a support: each position compares p and q on S ids only, so neither sums to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_present, check_same_shape


def stop_gradient_reverse_kl(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """L = sum_S p sg(log p - log q) of each position, [B, T]: the log-ratio is a fixed weight on the gradient of p.

    Gradient with respect to the student's logits (at temperature 1): p_j (m_j r_j - L), m_j = 1 on the support. Over
    the full vocabulary it is the gradient of KL(p || q). Descent with S fixed stops at p = q on S. Differentiating
    through the log-ratio instead would add the gradient of sum_S p, which drives student mass out of the support.

    The value is not a divergence (it can be negative, and the update is not the gradient of any scalar): log KL
    estimates apart. Masked entries count for nothing, in value and gradient, whatever they hold. Where p = 0 the term
    is 0; where q = 0 < p the value is inf and the gradient of that row is not finite.

    Args:
        student_logp_BTS: log p of the support's ids, normalised over the whole vocabulary.
        teacher_logp_BTS: log q of the same ids, normalised over the whole vocabulary; a constant.
        support_BTS: bool, the entries that count.

    Raises:
        ValueError: the shapes differ, or a teacher log-prob is missing (NaN) on an entry that counts.
    """
    check_same_shape(student_logp_BTS=student_logp_BTS, teacher_logp_BTS=teacher_logp_BTS, support_BTS=support_BTS)
    check_present(teacher_logp_BTS, support_BTS)
    logp_BTS = student_logp_BTS.masked_fill(~support_BTS, -torch.inf)
    p_BTS = logp_BTS.exp()
    log_ratio_BTS = torch.where(p_BTS > 0, logp_BTS.detach() - teacher_logp_BTS.detach(), 0.0)
    return (p_BTS * log_ratio_BTS).sum(-1)
