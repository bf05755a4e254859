"""Monitors of the student's whole distribution at each token, and of where in its response a token stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protos.records import Float32
from student_trainer.losses.pairing import check_same_shape

NUM_DECILES = 10


def entropy(p_BTV: Tensor, logp_BTV: Tensor) -> Tensor:
    """H = -sum_V p log p of each token, [B, T]; a token that has p = 0 adds nothing."""
    entropy_BT = -torch.linalg.vecdot(p_BTV, logp_BTV)
    if entropy_BT.isnan().any():  # 0 * -inf: seldom, and a pass over the vocabulary to mend
        entropy_BT = -torch.linalg.vecdot(p_BTV, torch.where(p_BTV == 0, 0.0, logp_BTV))
    return entropy_BT


def mass_of(ids: Sequence[int], p_BTV: Tensor) -> Tensor:
    """The mass of a few ids at each token, [B, T]: of the EOS ids, the chance that the response ends there."""
    return p_BTV[..., list(ids)].sum(-1)


def sampled_reverse_kl(student_logp_BT: Tensor, teacher_logp_BT: Tensor) -> Tensor:
    """log p(y) - log q(y) of the sampled tokens, [B, T]: sampled from p, their mean is unbiased for KL(p || q).

    Known as k1 (Schulman, "Approximating KL Divergence", 2020); it can be negative. A metric only: differentiated, its
    expected teacher signal is zero.
    """
    check_same_shape(student_logp_BT=student_logp_BT, teacher_logp_BT=teacher_logp_BT)
    return student_logp_BT - teacher_logp_BT


def decile_weights(lengths: Sequence[int]) -> list[Float32]:
    """Weights that turn a mean over all tokens into means by position: one array [T, D] for each response of T tokens.

    Token t of T lies in decile floor(D t / T). Its weight there is N / N_d, the tokens of all responses over those in
    that decile, and 0 elsewhere: the mean over all N tokens of value times weight is the mean over decile d alone,
    however the tokens are split into pieces. A decile without a token gives 0.
    """
    deciles = [np.arange(length) * NUM_DECILES // length for length in lengths]
    counts_D = np.bincount(np.concatenate(deciles), minlength=NUM_DECILES)
    weights_D = sum(lengths) / np.maximum(counts_D, 1)
    return [(np.eye(NUM_DECILES)[decile_T] * weights_D).astype(np.float32) for decile_T in deciles]
