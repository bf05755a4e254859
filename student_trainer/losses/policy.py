"""Learning from rewards: advantages, the clipped surrogate, the distance to a reference policy, and the value loss.

Shape letters: B sequences, T completion tokens, P problems, G samples of each. Log-probs and divergences are in nats,
at the temperature of sampling. `mask_BT` (bool) is True on the completion tokens that count; elsewhere every result is
0, with gradient 0, whatever the inputs hold there.

The losses are per token. The loop takes their mean over all tokens of an optimiser update (`reduce.token_mean`), so
that a token weighs the same in a short completion as in a long one: "dapo" among TRL's `loss_type`s (and "bnpo", where
the micro-batch is the whole update). TRL's "grpo" takes the mean of each sequence, then of the sequences; its
"dr_grpo" divides the sum by B times the budget of new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_present, check_same_shape

STD_EPS = 1e-4
"""Added to a standard deviation of rewards: far below that of any group with rewards in [0, 1] worth telling apart."""


def group_advantages(reward_PG: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """A = (R - mean) / (std + STD_EPS) within each problem's group, [P, G]; exactly 0 where its rewards are equal.

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2); std is the sample's, with G - 1. Without the division, as
    in Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), a group weighs by how far its rewards are apart.

    Raises:
        ValueError: a group of one, which has nothing to be relative to.
    """
    if reward_PG.shape[-1] < 2:
        raise ValueError(f"a group-relative advantage needs at least 2 samples a problem, got {reward_PG.shape[-1]}")
    is_equal_P1 = (reward_PG == reward_PG[:, :1]).all(-1, keepdim=True)
    advantage_PG = (reward_PG - reward_PG.mean(-1, keepdim=True)).masked_fill(is_equal_P1, 0.0)
    return advantage_PG / (reward_PG.std(-1, keepdim=True) + STD_EPS) if divide_by_std else advantage_PG


def clipped_surrogate(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """L = -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) of each token, [B, T]; w = p / p_old of the sampled token.

    PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7); with clip_high above clip_low, the clip-higher of DAPO (Yu et
    al. 2025, arXiv:2503.14476, eq. 10). Gradient with respect to log p: -w A, and 0 where `is_clipped`.

    Args:
        logp_BT: log p of the sampled tokens under the weights in training.
        old_logp_BT: the same under the weights that sampled them; a constant.
        advantage_BT: how much better than expected each token was; a constant.
        mask_BT: the tokens that count.
        clip_low: how far w may fall below 1 and still be pushed down.
        clip_high: how far w may rise above 1 and still be pushed up.

    Raises:
        ValueError: the shapes differ, or an old log-prob is missing (NaN) on a token that counts.
    """
    ratio_BT = _log_ratio(logp_BT, old_logp_BT, mask_BT, whose="old").exp()
    advantage_BT = torch.where(mask_BT, advantage_BT, 0.0)
    return -torch.min(ratio_BT * advantage_BT, ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantage_BT)


def is_clipped(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Where `clipped_surrogate` has no gradient because the ratio is beyond the clip on its advantage's side; bool."""
    ratio_BT = (logp_BT - old_logp_BT).exp()
    is_high_BT = (advantage_BT > 0) & (ratio_BT > 1 + clip_high)
    return is_high_BT | ((advantage_BT < 0) & (ratio_BT < 1 - clip_low))


def reference_kl(logp_BT: Tensor, reference_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """k3 = p_ref / p - 1 - log(p_ref / p) of each sampled token, [B, T]; never below 0.

    In value an unbiased estimate of KL(p || p_ref) from tokens of p (Schulman, "Approximating KL Divergence", 2020),
    added to the loss by GRPO (arXiv:2402.03300, eq. 4). Gradient with respect to log p: 1 - p_ref / p, which is in
    expectation that of KL(p_ref || p). (TRL multiplies it by the ratio unless `use_bias_correction_kl` is false.)

    Raises:
        ValueError: the shapes differ, or a reference log-prob is missing (NaN) on a token that counts.
    """
    log_ratio_BT = -_log_ratio(logp_BT, reference_logp_BT, mask_BT, whose="reference")
    return log_ratio_BT.expm1() - log_ratio_BT


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates, [B, T] (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    A_t = delta_t + gamma lambda A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, from a sequence's last token that
    counts, after which both V and A are 0, to its first; tokens that do not count are stepped over. The target of the
    values is A + V.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(reward_BT=reward_BT, value_BT=value_BT, mask_BT=mask_BT)
    advantage_BT = torch.zeros_like(value_BT)
    next_value_B = next_advantage_B = torch.zeros_like(value_BT[:, 0])
    for t in reversed(range(value_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * gae_lambda * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], value_BT[:, t], next_value_B)
        advantage_BT[:, t] = torch.where(mask_BT[:, t], next_advantage_B, 0.0)
    return advantage_BT


def whiten(advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The advantages with mean 0 and standard deviation 1 over the tokens that count (0 when they are all equal)."""
    counted = advantage_BT[mask_BT]
    scaled = (counted - counted.mean()) / (counted.std(correction=0) + STD_EPS)
    return torch.zeros_like(advantage_BT).masked_scatter(mask_BT, scaled)


def clipped_value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> Tensor:
    """max((V - R)^2, (V_clip - R)^2) / 2 of each token, [B, T], V_clip within `clip` of V_old; in squared rewards.

    The value loss of PPO's reference implementation (OpenAI baselines, ppo2), absent from the paper. Gradient with
    respect to V: V - R, and 0 where V has left the clip and the clipped error is the larger one.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(value_BT=value_BT, old_value_BT=old_value_BT, return_BT=return_BT, mask_BT=mask_BT)
    error_BT = torch.where(mask_BT, value_BT - return_BT, 0.0)
    near_BT = torch.clamp(value_BT, old_value_BT - clip, old_value_BT + clip)
    near_error_BT = torch.where(mask_BT, near_BT - return_BT, 0.0)
    return torch.max(error_BT**2, near_error_BT**2) / 2


def _log_ratio(logp_BT: Tensor, other_logp_BT: Tensor, mask_BT: Tensor, *, whose: str) -> Tensor:
    """log p - log p_other on the tokens that count, 0 elsewhere; p_other is a constant."""
    check_same_shape(**{"logp_BT": logp_BT, f"{whose}_logp_BT": other_logp_BT, "mask_BT": mask_BT})
    check_present(other_logp_BT, mask_BT, whose=whose)
    return torch.where(mask_BT, logp_BT - other_logp_BT.detach(), 0.0)
