"""How close a teacher is to a student, token by token on the student's own rollouts. Pure: arrays in, arrays out.

One position: p student, q teacher, K the width of both top lists, M = 2 K the ids of both together. Values in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from protos.records import PAD_ID, Float32, Int32, ScoreResult
from student_trainer import monitor
from student_trainer.evaluate import Z_95

Float64 = NDArray[np.float64]

NO_TAIL = 1e-6
"""A mass outside the lists that is no more than the rounding of float32 log-probs: taken as this in a ratio."""

MEASURES = (
    "reverse_kl",
    "reverse_kl_listed",
    "forward_kl_listed",
    "overlap_ratio",
    "overlap_student_mass",
    "overlap_teacher_mass",
    "teacher_advantage",
    "student_entropy",
    "teacher_entropy",
    "entropy_gap",
)


def token_measures(student: ScoreResult, teacher: ScoreResult) -> dict[str, Float64]:
    """Each of MEASURES at each of the T tokens of one rollout, [T].

    Both have scored the same completion with the same K, and each at the other's top ids (`candidate_logprobs`).

    reverse_kl is log p(y) - log q(y) of the sampled token, unbiased for KL(p || q) in the mean over tokens drawn from
    p; teacher_advantage is its negative. The `listed` divergences are exact over the ids of both lists, with all others
    as one more outcome: never above the true ones (data processing), equal to them where the lists hold the whole
    vocabulary. Entropies are NaN where a model did not give them.
    """
    lists = [
        torch.from_numpy(np.array(a))[None]
        for a in (student.top_ids, student.top_logprobs, teacher.top_ids, teacher.top_logprobs)
    ]
    overlap = monitor.overlap(*lists)
    logp_TM, logq_TM = _both_lists(student, teacher)
    reverse_kl_T = student.sampled_logprobs.astype(np.float64) - teacher.sampled_logprobs
    student_entropy_T, teacher_entropy_T = (_entropy(one) for one in (student, teacher))
    return {
        "reverse_kl": reverse_kl_T,
        "reverse_kl_listed": listed_kl(logp_TM, logq_TM),
        "forward_kl_listed": listed_kl(logq_TM, logp_TM),
        "overlap_ratio": overlap.ratio_BT[0].double().numpy(),
        "overlap_student_mass": overlap.student_mass_BT[0].double().numpy(),
        "overlap_teacher_mass": overlap.teacher_mass_BT[0].double().numpy(),
        "teacher_advantage": -reverse_kl_T,
        "student_entropy": student_entropy_T,
        "teacher_entropy": teacher_entropy_T,
        "entropy_gap": student_entropy_T - teacher_entropy_T,
    }


def listed_kl(logp_TM: Float64, logq_TM: Float64) -> Float64:
    """KL(p || q) over M listed ids and everything else as one more outcome, [T] in nats.

    Args:
        logp_TM, logq_TM: -inf on entries that do not count.
    """
    p_TM, q_TM = np.exp(logp_TM), np.exp(logq_TM)
    log_ratio_TM = np.subtract(logp_TM, logq_TM, out=np.zeros_like(logp_TM), where=p_TM > 0)
    p_tail_T = np.maximum(1 - p_TM.sum(-1), NO_TAIL)
    q_tail_T = np.maximum(1 - q_TM.sum(-1), NO_TAIL)
    return (p_TM * log_ratio_TM).sum(-1) + p_tail_T * np.log(p_tail_T / q_tail_T)


@dataclass(frozen=True)
class Mean:
    """A mean over tokens with its 95 % interval, in which rollouts, not tokens, are the independent unit."""

    value: float
    low: float
    high: float

    def figures(self) -> dict[str, float]:
        """By name, for the result."""
        return {"mean": self.value, "low": self.low, "high": self.high}


def token_mean(rollouts: Sequence[Float64]) -> Mean:
    """The mean over all tokens of B rollouts [T]; the interval is of a ratio of sums over rollouts (delta method).

    The interval of a single rollout is not known: NaN.
    """
    sums_B = np.array([float(values.sum()) for values in rollouts])
    lengths_B = np.array([len(values) for values in rollouts])
    value = float(sums_B.sum() / lengths_B.sum())
    if len(rollouts) < 2:
        return Mean(value, math.nan, math.nan)
    residuals_B = sums_B - value * lengths_B
    error = math.sqrt(float((residuals_B**2).sum()) * len(rollouts) / (len(rollouts) - 1)) / float(lengths_B.sum())
    return Mean(value, value - Z_95 * error, value + Z_95 * error)


def decile_means(rollouts: Sequence[Float64]) -> list[float]:
    """The mean of the tokens in each tenth of their rollouts, 10 values; NaN for a tenth without tokens."""
    values = np.concatenate(rollouts)
    deciles = np.concatenate([monitor.deciles(len(rollout)) for rollout in rollouts])
    return [float(np.mean(values[deciles == d])) if d in deciles else math.nan for d in range(monitor.NUM_DECILES)]


def summary(rollouts: Sequence[Mapping[str, Float64]]) -> dict[str, dict[str, object]]:
    """Mean, interval and deciles of each measure; of one that a model did not give, nothing."""
    found: dict[str, dict[str, object]] = {}
    for name in MEASURES:
        values = [rollout[name] for rollout in rollouts]
        if not any(np.isnan(one).any() for one in values):
            found[name] = {**token_mean(values).figures(), "by_decile": decile_means(values)}
    return found


def _both_lists(student: ScoreResult, teacher: ScoreResult) -> tuple[Float64, Float64]:
    """log p and log q at the student's top ids and then the teacher's, [T, 2 K]; -inf where an id is there already."""
    is_new_TK = ~_found(teacher.top_ids, student.top_ids)
    logp_TM = np.concatenate([student.top_logprobs, np.where(is_new_TK, student.candidate_logprobs, -np.inf)], -1)
    logq_TM = np.concatenate([teacher.candidate_logprobs, np.where(is_new_TK, teacher.top_logprobs, -np.inf)], -1)
    return logp_TM.astype(np.float64), logq_TM.astype(np.float64)


def _found(ids_TK: Int32, among_TK: Int32) -> NDArray[np.bool_]:
    return ((ids_TK[:, :, None] == among_TK[:, None, :]) & (ids_TK != PAD_ID)[:, :, None]).any(-1)


def _entropy(result: ScoreResult) -> Float64:
    values: Float32 = np.full(result.num_tokens, np.nan, np.float32) if result.entropy is None else result.entropy
    return values.astype(np.float64)
