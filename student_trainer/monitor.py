"""What is watched while a student learns: pure functions of arrays and texts, every mean taken per response token.

Shape letters as in student_trainer.losses; `mask_BT` is true on response tokens, and nothing else is read. Logs are
natural, entropies and divergences in nats. A NaN on a response token makes its metric NaN: nothing is filled in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_same_shape
from student_trainer.losses.reduce import token_mean
from student_trainer.losses.support import find

HEDGES = frozenset({"wait", "but", "maybe", "hmm", "perhaps", "actually", "alternatively"})
"""Words that rise when a student learns to hedge between conflicting privileged teachers."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """How far the two top-K lists agree, means over tokens: |intersection| / K, and the mass of p and q on it."""

    ratio: float
    student_mass: float
    teacher_mass: float


@dataclass(frozen=True)
class SupportMass:
    """P and Q, the mean mass of the student and the teacher on the loss's support, and P - Q."""

    student: float
    teacher: float
    gap: float


@dataclass(frozen=True)
class Lengths:
    """Response tokens: mean and 95th percentile; and the share of responses cut at the budget, without EOS."""

    mean: float
    p95: float
    truncation_rate: float


def overlap(
    student_top_ids_BTK: Tensor,
    student_top_logp_BTK: Tensor,
    teacher_top_ids_BTK: Tensor,
    teacher_top_logp_BTK: Tensor,
    mask_BT: Tensor,
) -> Overlap:
    """Overlap of the student's and the teacher's top-K.

    Raises:
        ValueError: the lists differ in shape (one K for both), or there is no response token.
    """
    check_same_shape(
        student_top_ids_BTK=student_top_ids_BTK,
        student_top_logp_BTK=student_top_logp_BTK,
        teacher_top_ids_BTK=teacher_top_ids_BTK,
        teacher_top_logp_BTK=teacher_top_logp_BTK,
    )
    _, shared_student_BTK = find(student_top_ids_BTK, teacher_top_ids_BTK)
    _, shared_teacher_BTK = find(teacher_top_ids_BTK, student_top_ids_BTK)
    return Overlap(
        ratio=_mean(shared_student_BTK.double().mean(-1), mask_BT),
        student_mass=_mean(_mass(student_top_logp_BTK, shared_student_BTK), mask_BT),
        teacher_mass=_mean(_mass(teacher_top_logp_BTK, shared_teacher_BTK), mask_BT),
    )


def support_mass(
    student_logp_BTS: Tensor, teacher_logp_BTS: Tensor, support_BTS: Tensor, mask_BT: Tensor
) -> SupportMass:
    """P and Q on the support (bool); P falling while Q stays is student mass leaking out of it."""
    student = _mean(_mass(student_logp_BTS, support_BTS), mask_BT)
    teacher = _mean(_mass(teacher_logp_BTS, support_BTS), mask_BT)
    return SupportMass(student, teacher, student - teacher)


def entropy(logp_BTV: Tensor, mask_BT: Tensor) -> float:
    """Mean entropy of the distributions, -sum_V p log p."""
    p_BTV = logp_BTV.exp()
    return _mean(-(p_BTV * torch.where(p_BTV > 0, logp_BTV, 0.0)).sum(-1), mask_BT)


def sampled_reverse_kl(student_logp_BT: Tensor, teacher_logp_BT: Tensor, mask_BT: Tensor) -> float:
    """Unbiased estimate of KL(p || q) from tokens sampled from p: the mean of log p(y) - log q(y); it can be negative.

    Known as k1 (Schulman, "Approximating KL Divergence", 2020). A metric only: differentiated, its expected teacher
    signal is zero.
    """
    check_same_shape(student_logp_BT=student_logp_BT, teacher_logp_BT=teacher_logp_BT)
    return _mean(student_logp_BT - teacher_logp_BT, mask_BT)


def lengths(mask_BT: Tensor, ended_B: Tensor) -> Lengths:
    """Lengths of the responses; `ended_B` (bool) is true where a response ended with EOS or a stop id."""
    num_tokens_B = mask_BT.sum(-1).double()
    return Lengths(
        mean=float(num_tokens_B.mean()),
        p95=float(num_tokens_B.quantile(0.95)),
        truncation_rate=float((~ended_B).double().mean()),
    )


def hedge_frequency(texts: Iterable[str], num_tokens: int, hedges: frozenset[str] = HEDGES) -> float:
    """Hedge words (lower-case, whole words) in the responses per response token.

    Raises:
        ValueError: there is no response token.
    """
    if num_tokens < 1:
        raise ValueError(f"a frequency over {num_tokens} tokens does not exist")
    return sum(word in hedges for text in texts for word in _WORD.findall(text.lower())) / num_tokens


def repeat_ratio(responses: Sequence[Sequence[int]]) -> float:
    """Share of response tokens whose trailing 3-gram occurred earlier in the same response.

    Raises:
        ValueError: there is no response token.
    """
    num_tokens = sum(map(len, responses))
    if num_tokens < 1:
        raise ValueError("a repeat ratio over 0 tokens does not exist")
    trigrams = [list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in responses]
    return sum(len(grams) - len(set(grams)) for grams in trigrams) / num_tokens


def _mean(value_BT: Tensor, mask_BT: Tensor) -> float:
    return float(token_mean(value_BT.detach(), mask_BT))


def _mass(logp_BTN: Tensor, counted_BTN: Tensor) -> Tensor:
    return torch.where(counted_BTN, logp_BTN.exp(), 0.0).sum(-1)
