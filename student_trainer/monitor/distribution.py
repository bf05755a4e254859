"""Monitors of the student's whole distribution at each token, and of where in its response a token stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protos.records import Int32
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


def deciles(num_tokens: int) -> Int32:
    """Where in a response of T tokens each of them stands, [T]: token t in decile floor(D t / T), from 0."""
    return (np.arange(num_tokens) * NUM_DECILES // num_tokens).astype(np.int32)
