"""Group-relative policy optimisation: the samples of a problem are judged against each other.

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300; with the clip-higher, the dynamic filtering and the token mean of
DAPO (Yu et al. 2025, arXiv:2503.14476). The old log-probs are the sampler's.
"""

from __future__ import annotations

import torch

from student_trainer.config import GrpoStage
from student_trainer.losses.policy import group_advantages
from student_trainer.stages.actor import Actor, Experience, collate_written
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.policy import Policy, collected
from student_trainer.stages.surrogate import Reference, Surrogate


class Grpo(Policy):
    """Groups of rollouts, each token with its sequence's advantage; `reference` is None without a KL term."""

    def __init__(
        self, config: GrpoStage, actor: Actor, surrogate: Surrogate, reference: Reference | None, *, group_size: int
    ) -> None:
        super().__init__(actor, surrogate, reference)
        self._config = config
        self._group_size = group_size

    def collect(self, step: int) -> Collected:
        """Step s's rollouts, without the groups and completions that are not learnt from.

        While groups are missing, as many further problems are drawn, at most `max_draws` times in all.
        """
        experience = self._actor.act(step)
        advantage_PG, dropped_P = self._judged(experience)
        num_problems, num_draws = len(dropped_P), 1
        while int((~dropped_P).sum()) < num_problems and num_draws < self._config.max_draws:
            # One further problem was drawn, or is now, for each group that was dropped.
            places = range(len(dropped_P) - num_problems, int(dropped_P.sum()))
            experience = experience.joined(self._actor.act_further(step, places))
            advantage_PG, dropped_P = self._judged(experience)
            num_draws += 1
        kept_B = experience.learnt_B & ~dropped_P.repeat_interleave(self._group_size)
        rollouts = [rollout for rollout, is_kept in zip(experience.rollouts, kept_B, strict=True) if is_kept]
        batch = self._with_reference(collate_written(rollouts, advantage_PG.flatten()[kept_B]))
        metrics: Metrics = {
            "groups_dropped": int(dropped_P.sum()),
            "draws": num_draws,
            "rollouts_masked": int((~experience.learnt_B).sum()),
        }
        return collected(self._config, batch, experience, metrics)

    def _judged(self, experience: Experience) -> tuple[torch.Tensor, torch.Tensor]:
        """The advantages, [P, G], and which groups are left out, [P]: those whose rewards are equal."""
        reward_PG = experience.reward_B.view(-1, self._group_size)
        advantage_PG = group_advantages(reward_PG, divide_by_std=self._config.divide_by_std)
        # Advantages are exactly 0 in such a group, and in no other.
        is_dropped_P = ~advantage_PG.any(-1) if self._config.drop_equal_groups else torch.zeros(len(reward_PG)).bool()
        return advantage_PG, is_dropped_P
