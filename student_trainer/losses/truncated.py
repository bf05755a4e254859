"""Losses truncated to a support: each position compares p and q on S ids only, so neither sums to 1.

Every function takes log-probs that are normalised over the whole vocabulary, and the teacher as a constant. P and Q are
the masses of p and q on the support, m_j is 1 on it and 0 elsewhere. Gradients are with respect to the student's logits
at temperature 1; "descent stops" speaks of a support that stays as it is.

All raise ValueError when shapes differ, or a teacher log-prob is missing (NaN) on an entry that counts. Masked entries
count for nothing, in value and gradient, whatever they hold; a position without support has neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses.divergence import kl
from student_trainer.losses.pairing import check_present, check_same_shape

TAIL_ULPS = 8
"""How far, in units of the last place of 1, a teacher's 1 - Q may be off: each log-prob of its list was rounded, and
1 - Q cancels. About 1e-6 in float32."""


def stop_gradient_reverse_kl(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """L = sum_S p sg(log p - log q) of each position, [B, T]: the log-ratio is a fixed weight on the gradient of p.

    Gradient: p_j (m_j r_j - L). Over the full vocabulary it is the gradient of KL(p || q). Descent stops at p = q on S,
    and P = Q.

    The value is not a divergence (it can be negative, and the update is not the gradient of any scalar): log KL
    estimates apart. Where p = 0 the term is 0; where q = 0 < p the value is inf and the gradient of that row is not
    finite.

    Args:
        student_logp_BTS: log p of the support's ids.
        teacher_logp_BTS: log q of the same ids.
        support_BTS: bool, the entries that count.
    """
    logp_BTS, logq_BTS = _on_support(student_logp_BTS, teacher_logp_BTS, support_BTS)
    return (logp_BTS.exp() * _log_ratio(logp_BTS.detach(), logq_BTS)).sum(-1)


def biased_reverse_kl(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """L = sum_S p (log p - log q) of each position, [B, T], differentiated whole: biased, kept for study.

    Gradient: p_j [m_j (r_j + 1) - L - P], which is `stop_gradient_reverse_kl`'s plus p_j (m_j - P), the gradient of P:
    over a whole vocabulary the +1 cancels, on a support it drives mass out of it. A token is pulled up only where
    q / p > exp(1 - P - L). Descent stops at p = q / e on S: P = Q / e and L = -Q / e < 0. With EOS in the support its
    probability falls by the same factor, so that completions grow up to e times as long.

    Arguments and edges as for `stop_gradient_reverse_kl`.
    """
    logp_BTS, logq_BTS = _on_support(student_logp_BTS, teacher_logp_BTS, support_BTS)
    return (logp_BTS.exp() * _log_ratio(logp_BTS, logq_BTS)).sum(-1)


def renormalised_reverse_kl(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """KL(p / P || q / Q) on the support of each position, [B, T] in nats.

    Gradient: m_j p_j / P (r_j - log(P / Q) - L). Descent stops at p / P = q / Q; P is free, and nothing outside the
    support gets a gradient. With one id it is identically 0.

    Where a model has no mass at all on a support that is not empty, p / P does not exist and the row is NaN. Other
    edges as for `reverse_kl`; arguments as for `stop_gradient_reverse_kl`.
    """
    logp_BTS, logq_BTS = _on_support(student_logp_BTS, teacher_logp_BTS, support_BTS)
    return kl(_renormalised(logp_BTS, support_BTS), _renormalised(logq_BTS, support_BTS))


def renormalised_forward_kl(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """KL(q / Q || p / P) on the support of each position, [B, T] in nats.

    Gradient: m_j (p_j / P - q_j / Q). Descent stops as that of `renormalised_reverse_kl`; edges are the same too.
    """
    logp_BTS, logq_BTS = _on_support(student_logp_BTS, teacher_logp_BTS, support_BTS)
    return kl(_renormalised(logq_BTS, support_BTS), _renormalised(logp_BTS, support_BTS))


def tail_reverse_kl(
    student_logp_BTS: Tensor, student_log_tail_BT: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor
) -> Tensor:
    """KL(p || q) with everything outside the support as one more outcome, the tail, of each position: [B, T] in nats.

    L = sum_S p r + (1 - P) r_tail, r_tail = log((1 - P) / (1 - Q)). Gradient: p_j (r_j - L) on the support and
    p_j (r_tail - L) off it. Descent stops at p = q on S, and P = Q. Over the whole vocabulary it is `reverse_kl`.

    The student's tail is summed over the ids it holds, the teacher's is 1 - Q, which cancels: see `TAIL_ULPS`. Of the
    values that it may have, the one nearest to the student's is taken, so that a tail below the precision of the list
    neither blows up nor moves anything, and p = q has no gradient to the bit.

    Args:
        student_log_tail_BT: `log_tail` of the student.
        student_logp_BTS, teacher_logp_BTS, support_BTS: as for `stop_gradient_reverse_kl`; edges as for `reverse_kl`.
    """
    return kl(*_with_tails(student_logp_BTS, student_log_tail_BT, teacher_logp_BTS, support_BTS))


def tail_forward_kl(
    student_logp_BTS: Tensor, student_log_tail_BT: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor
) -> Tensor:
    """KL(q || p) with everything outside the support as one more outcome, the tail, of each position: [B, T] in nats.

    Gradient: p_j - q_j on the support, and p_j - (1 - Q) p_j / (1 - P) off it. Descent stops as that of
    `tail_reverse_kl`; arguments and the teacher's tail are the same too. Edges as for `forward_kl`.
    """
    logp, logq = _with_tails(student_logp_BTS, student_log_tail_BT, teacher_logp_BTS, support_BTS)
    return kl(logq, logp)


def _on_support(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """Both checked; -inf, no mass, on masked entries; the teacher detached."""
    check_same_shape(student_logp_BTS=student_logp_BTS, teacher_logp_BTS=teacher_logp_BTS, support_BTS=support_BTS)
    check_present(teacher_logp_BTS, support_BTS)
    return (
        student_logp_BTS.masked_fill(~support_BTS, -torch.inf),
        teacher_logp_BTS.detach().masked_fill(~support_BTS, -torch.inf),
    )


def _log_ratio(logp_BTS: Tensor, logq_BTS: Tensor) -> Tensor:
    """log p - log q where p > 0, else 0."""
    return torch.where(logp_BTS.exp() > 0, logp_BTS - logq_BTS, 0.0)


def _renormalised(logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """Log-probs that sum to 1 over the support; where that is empty, no mass anywhere."""
    is_empty_BT1 = ~support_BTS.any(-1, keepdim=True)
    return logp_BTS.masked_fill(is_empty_BT1, 0.0).log_softmax(-1).masked_fill(~support_BTS, -torch.inf)


def _with_tails(
    student_logp_BTS: Tensor, student_log_tail_BT: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor
) -> tuple[Tensor, Tensor]:
    """Two whole distributions over S + 1 outcomes, student's and teacher's, the tail last."""
    check_same_shape(student_logp_BTS=student_logp_BTS[..., 0], student_log_tail_BT=student_log_tail_BT)
    logp_BTS, logq_BTS = _on_support(student_logp_BTS, teacher_logp_BTS, support_BTS)
    uncertainty = TAIL_ULPS * torch.finfo(teacher_logp_BTS.dtype).eps
    teacher_tail_BT = (1 - logq_BTS.exp().sum(-1)).clamp(min=0)
    log_tail_BT = student_log_tail_BT.detach()
    gap_BT = log_tail_BT.exp() - teacher_tail_BT
    nearest_BT = teacher_tail_BT + gap_BT.clamp(-uncertainty, uncertainty)
    teacher_log_tail_BT = torch.where(gap_BT.abs() <= uncertainty, log_tail_BT, nearest_BT.log())
    return (
        torch.cat([logp_BTS, student_log_tail_BT[..., None]], -1),
        torch.cat([logq_BTS, teacher_log_tail_BT[..., None]], -1),
    )
