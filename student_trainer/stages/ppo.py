"""Proximal policy optimisation: each token is judged by a critic that learns what to expect.

Schulman et al. 2017, arXiv:1707.06347, for language models as in Ouyang et al. 2022, arXiv:2203.02155: the task's
reward comes with a completion's last token, a penalty on log p - log p_ref with every token. The critic shares no
weight with the student and its targets are fixed when the rollouts are, so that it learns before the student does and
the updates are those of the two learning in turn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from student_trainer.alarms import SKIPPED
from student_trainer.collate import Batch
from student_trainer.config import PpoStage
from student_trainer.losses.policy import gae, whiten
from student_trainer.stages.actor import Actor, collate_written
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.critic import Critic
from student_trainer.stages.policy import Policy, collected
from student_trainer.stages.surrogate import Reference, Surrogate


class Ppo(Policy):
    """Rollouts with the advantages that the critic gives their tokens; `reference` is None without a penalty."""

    def __init__(
        self, config: PpoStage, actor: Actor, surrogate: Surrogate, critic: Critic, reference: Reference | None
    ) -> None:
        super().__init__(actor, surrogate, reference)
        self._config = config
        self._critic = critic

    def collect(self, step: int) -> Collected:
        """Step s's rollouts and advantages; the critic has learnt from them when it returns."""
        config, experience = self._config, self._actor.act(step)
        rollouts = [rollout for rollout, learnt in zip(experience.rollouts, experience.learnt_B, strict=True) if learnt]
        metrics: Metrics = {"rollouts_masked": len(experience.rollouts) - len(rollouts)}
        batch = self._with_reference(collate_written(rollouts))
        if not rollouts:
            return collected(config, batch, experience, metrics)
        value_BT = self._critic.values(batch)
        reward_BT = token_rewards(batch, experience.reward_B[experience.learnt_B], config.kl_coefficient)
        advantage_BT = gae(reward_BT, value_BT, batch.mask_BT, gamma=config.gamma, gae_lambda=config.gae_lambda)
        target = dataclasses.replace(batch, old_value_BT=value_BT, return_BT=advantage_BT + value_BT)
        fit = self._critic.fit(target.shares(config.num_minibatches), num_epochs=config.num_epochs)
        metrics |= {
            "value_loss": fit.loss,
            "value_mean": float(value_BT[batch.mask_BT].mean()),
            SKIPPED: fit.num_skipped,
        }
        learnt = dataclasses.replace(batch, advantage_BT=whiten(advantage_BT, batch.mask_BT))
        return collected(config, learnt, experience, metrics)

    def state_dict(self) -> dict[str, Any]:
        """The critic's."""
        return self._critic.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._critic.load_state_dict(state_dict)


def token_rewards(batch: Batch, reward_B: torch.Tensor, kl_coefficient: float) -> torch.Tensor:
    """The reward of each token, [B, T]: R at a sequence's last, and -kl_coefficient (log p - log p_ref) at each."""
    reward_BT = torch.zeros(batch.mask_BT.shape)
    if batch.reference_logp_BT is not None:
        assert batch.sampled_logp_BT is not None
        log_ratio_BT = batch.sampled_logp_BT - batch.reference_logp_BT
        reward_BT = torch.where(batch.mask_BT, -kl_coefficient * log_ratio_BT, 0.0)
    last_B = batch.mask_BT.sum(-1) - 1
    return reward_BT.scatter_add(1, last_B[:, None], reward_B[:, None])
