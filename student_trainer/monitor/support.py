"""Monitors of the ids that a truncated loss compares: do the lists agree, and does mass leak out of the support.

One position: p student, q teacher, S the support, P = sum_S p, Q = sum_S q, r = log p - log q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_same_shape
from student_trainer.losses.support import Support, find


@dataclass(frozen=True)
class Overlap:
    """How far the two top-K lists agree, [B, T] each: |intersection| / K, and the mass of p and q on it."""

    ratio_BT: Tensor
    student_mass_BT: Tensor
    teacher_mass_BT: Tensor


@dataclass(frozen=True)
class SupportMass:
    """P and Q, the mass of the student and the teacher on the loss's support, and P - Q; [B, T] each."""

    student_BT: Tensor
    teacher_BT: Tensor
    gap_BT: Tensor


@dataclass(frozen=True)
class Bias:
    """What the unnormalised loss would do beside the stop-gradient one, [B, T] each.

    The unnormalised loss L = sum_S p r has the gradient of the stop-gradient one plus grad P, which drives the
    student's mass out of the support.

    Attributes:
        norm_BT: ||grad P|| with respect to the logits at temperature 1.
        pull_norm_BT: ||g|| of the stop-gradient loss.
        flipped_share_BT: share of S that the teacher prefers and the unnormalised loss pushes down all the same, the
            softmax included: 1 < q/p < exp(1 - P - L).
        flipped_score_share_BT: the same by the coefficient on grad log p alone: 1 < q/p < e.
    """

    norm_BT: Tensor
    pull_norm_BT: Tensor
    flipped_share_BT: Tensor
    flipped_score_share_BT: Tensor


def overlap(
    student_top_ids_BTK: Tensor,
    student_top_logp_BTK: Tensor,
    teacher_top_ids_BTK: Tensor,
    teacher_top_logp_BTK: Tensor,
) -> Overlap:
    """Overlap of the student's and the teacher's top-K; PAD_ID is never shared.

    Raises:
        ValueError: the lists differ in shape (one K for both).
    """
    check_same_shape(
        student_top_ids_BTK=student_top_ids_BTK,
        student_top_logp_BTK=student_top_logp_BTK,
        teacher_top_ids_BTK=teacher_top_ids_BTK,
        teacher_top_logp_BTK=teacher_top_logp_BTK,
    )
    entry_BTK, shared_student_BTK = find(student_top_ids_BTK, teacher_top_ids_BTK)
    times_BTK = torch.zeros_like(entry_BTK).scatter_add_(-1, entry_BTK, shared_student_BTK.long())
    return Overlap(
        ratio_BT=shared_student_BTK.float().mean(-1),
        student_mass_BT=_mass(student_top_logp_BTK, shared_student_BTK),
        teacher_mass_BT=_mass(teacher_top_logp_BTK, times_BTK > 0),
    )


def support_mass(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> SupportMass:
    """P and Q on the support (bool); P falling while Q stays is student mass leaking out of it."""
    student_BT, teacher_BT = _mass(student_logp_BTS, support_BTS), _mass(teacher_logp_BTS, support_BTS)
    return SupportMass(student_BT, teacher_BT, student_BT - teacher_BT)


def unnormalised_loss(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> Tensor:
    """L = sum_S p r of each token, [B, T], whatever loss is descended; a term with p = 0 is 0.

    At least P log(P / Q) (the log-sum inequality): negative only where the student has less mass on S than the
    teacher. Descending it stops at -Q / e.
    """
    p_BTS, log_ratio_BTS = _terms(student_logp_BTS, teacher_logp_BTS, support_BTS)
    return (p_BTS * log_ratio_BTS).sum(-1)


def outside_square_mass(p_BTV: Tensor, support: Support) -> Tensor:
    """The sum of p_v^2 over the vocabulary outside the support, [B, T]; all that `bias` needs of those ids."""
    ids_BTS = support.ids_BTS.masked_fill(~support.mask_BTS, 0)
    # What does not count leaves the minimum, and so p, as it is.
    zero_BTS = torch.zeros_like(ids_BTS, dtype=p_BTV.dtype).masked_fill(~support.mask_BTS, torch.inf)
    outside_BTV = p_BTV.scatter_reduce(-1, ids_BTS, zero_BTS, "amin")
    return torch.linalg.vecdot(outside_BTV, outside_BTV)


def bias(
    student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor, outside_square_mass_BT: Tensor
) -> Bias:
    """See `Bias`; closed forms, no backward pass.

    With m_j = 1 on S: grad_j P = p_j (m_j - P) and g_j = p_j (m_j r_j - L).
    """
    p_BTS, log_ratio_BTS = _terms(student_logp_BTS, teacher_logp_BTS, support_BTS)
    mass_BT = p_BTS.sum(-1)
    loss_BT = (p_BTS * log_ratio_BTS).sum(-1)
    inside_BT = p_BTS.square().sum(-1)
    bias_BT = inside_BT * (1 - mass_BT).square() + outside_square_mass_BT * mass_BT.square()
    pull_BTS = p_BTS * (log_ratio_BTS - loss_BT[..., None])
    pull_BT = pull_BTS.square().sum(-1) + outside_square_mass_BT * loss_BT.square()
    # log(q / p); a masked entry is 0 here and never above the lower bound.
    wanted_BTS = -log_ratio_BTS
    num_ids_BT = support_BTS.sum(-1).clamp_min(1)

    def share_below(threshold_BT1: Tensor | float) -> Tensor:
        return ((wanted_BTS > 0) & (wanted_BTS < threshold_BT1)).sum(-1) / num_ids_BT

    return Bias(
        norm_BT=bias_BT.sqrt(),
        pull_norm_BT=pull_BT.sqrt(),
        flipped_share_BT=share_below((1 - mass_BT - loss_BT)[..., None]),
        flipped_score_share_BT=share_below(1.0),
    )


def bias_ratio(norm: float, pull_norm: float) -> float:
    """||grad P|| / ||g||, of the means over tokens: single tokens at p = q have no pull to divide by; NaN at 0 / 0."""
    if pull_norm:
        return norm / pull_norm
    return float("inf") if norm else float("nan")


def _terms(student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor) -> tuple[Tensor, Tensor]:
    """p and r on the support, [B, T, S]; both 0 on masked entries, r also where p = 0."""
    check_same_shape(student_logp_BTS=student_logp_BTS, teacher_logp_BTS=teacher_logp_BTS, support_BTS=support_BTS)
    p_BTS = torch.where(support_BTS, student_logp_BTS.exp(), 0.0)
    return p_BTS, torch.where(p_BTS == 0, 0.0, student_logp_BTS - teacher_logp_BTS)


def _mass(logp_BTN: Tensor, counted_BTN: Tensor) -> Tensor:
    return torch.where(counted_BTN, logp_BTN.exp(), 0.0).sum(-1)
