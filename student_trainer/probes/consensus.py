"""What a student that never sees the privileged information (PI) can learn of teachers that do. Pure.

One position: q_1 .. q_M are the teacher's distributions under M different PIs. min over p of the mean of KL(p || q_i)
is KL(p || g) - log Z with g = exp(mean log q_i) / Z, the normalised geometric mean: descent on the reverse KL stops at
g, and -log Z >= 0 is the divergence that is left, 0 only where all agree (log-linear pooling: Genest and Zidek 1986,
"Combining Probability Distributions", section 4). Values in nats.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

LOWEST_LOGP = -60.0
"""In place of lower log-probs, which one teacher's -inf would make of the whole mean: e^-60 is beyond any sampling."""


def with_tail(logp_MTS: Float64) -> Float64:
    """The same with everything outside the S listed ids as one more outcome, [M, T, S + 1]; masked entries are -inf.

    A mean over ids is coarser than one over this, so that divergences and the floor come out no larger than they are.
    """
    tail_MT = 1 - np.exp(logp_MTS).sum(-1)
    log_tail_MT = np.log(np.maximum(tail_MT, np.exp(LOWEST_LOGP)))
    return np.concatenate([logp_MTS, log_tail_MT[..., None]], -1)


def geometric_mean(logq_MTS: Float64) -> tuple[Float64, Float64]:
    """log g, [T, S], and the floor -log Z, [T], of M distributions; entries that are -inf in all of them stay so."""
    is_absent_TS = np.isneginf(logq_MTS).all(0)
    mean_TS = np.where(is_absent_TS, -np.inf, np.maximum(logq_MTS, LOWEST_LOGP).mean(0))
    log_z_T = np.logaddexp.reduce(mean_TS, -1)
    return mean_TS - log_z_T[:, None], np.maximum(0.0, -log_z_T)


def disagreement(logq_MTS: Float64) -> Float64:
    """The generalised Jensen-Shannon divergence of M distributions, [T]: H(mean q) - mean H(q), the information that a
    token gives about which PI the teacher had; at most log M (Lin 1991). The floor of the forward KL.
    """
    mean_TS = np.logaddexp.reduce(logq_MTS, 0) - np.log(len(logq_MTS))
    return kl(logq_MTS, np.broadcast_to(mean_TS, logq_MTS.shape)).mean(0)


def kl(logp: Float64, logq: Float64) -> Float64:
    """KL(p || q) over the last axis; terms with p = 0 are 0, and q is taken as at least e^LOWEST_LOGP."""
    p = np.exp(logp)
    return np.where(p > 0, p * (np.where(p > 0, logp, 0.0) - np.maximum(logq, LOWEST_LOGP)), 0.0).sum(-1)


def share_kept(information: float, lost: float) -> float:
    """1 - lost / information, at least 0: the part of what the PI brings that holds whichever problem's PI it is.

    Args:
        information: sum of KL(q_own || q_free), what the teacher's own PI brings over none.
        lost: sum of KL(q_own || g_others), what is missing of it in the geometric mean of the teachers that have been
            given other problems' PI instead.

    Returns:
        NaN where the PI brings nothing.
    """
    return max(0.0, 1 - lost / information) if information > 0 else float("nan")
