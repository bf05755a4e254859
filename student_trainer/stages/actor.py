"""The step's rollouts and their rewards: what every stage learns from that learns from rewards.

Each rank writes and rewards its share of the problems and then has what the others wrote, so that all judge the same
groups alike and draw the same further problems as one process would.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from student_trainer.collate import Batch, collate
from student_trainer.distributed import agreed, gather, share
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.seeds import further_seed, pick_at, seeds_at
from student_trainer.stages.base import Metrics
from student_trainer.tasks import Task


@dataclass(frozen=True)
class Experience:
    """One step's rollouts, the samples of a problem next to each other.

    Attributes:
        rollouts: B of them.
        rewards: the task's own, of each.
        reward_B: float32, what each is learnt to be worth.
        learnt_B: bool, False where a rollout is left out of the loss because the budget cut it.
        metrics: of all of them, by name.
    """

    rollouts: Sequence[Rollout]
    rewards: Sequence[float]
    reward_B: torch.Tensor
    learnt_B: torch.Tensor
    metrics: Metrics

    def joined(self, later: Experience) -> Experience:
        """Both, `later` behind this one; the metrics, all of them sums, are added."""
        return Experience(
            [*self.rollouts, *later.rollouts],
            [*self.rewards, *later.rewards],
            torch.cat([self.reward_B, later.reward_B]),
            torch.cat([self.learnt_B, later.learnt_B]),
            {name: value + later.metrics[name] for name, value in self.metrics.items()},
        )


class Actor:
    """Writes each step's rollouts with the student's weights and has the task reward them; every rank calls it.

    Args:
        truncated: what becomes of a completion cut at the budget; see `PolicyStage.truncated`.
    """

    def __init__(
        self,
        task: Task,
        sampler: Sampler,
        sampling: SamplingParams,
        *,
        truncated: Literal["mask", "punish"],
        problems_per_step: int,
        seed: int,
    ) -> None:
        self._task = task
        self._sampler = sampler
        self._sampling = sampling
        self._truncated = truncated
        self._problems_per_step = problems_per_step
        self._seed = seed

    def act(self, step: int) -> Experience:
        """Step s's rollouts and rewards."""
        start = step * self._problems_per_step
        return self._act(range(start, start + self._problems_per_step), self._seed)

    def act_further(self, step: int, places: Sequence[int]) -> Experience:
        """The same of further problems, at those places of a stream that is step s's own."""
        return self._act(places, further_seed(self._seed, step))

    def _act(self, places: Sequence[int], seed: int) -> Experience:
        parts = gather(agreed(lambda: self._written(share(places), seed)))
        rollouts = [rollout for own, *_ in parts for rollout in own]
        rewards = [reward for _, own, _ in parts for reward in own]
        finished_B = torch.tensor([rollout.is_finished for rollout in rollouts])
        reward_B = torch.tensor(rewards, dtype=torch.float32)
        is_masking = self._truncated == "mask"
        return Experience(
            rollouts,
            rewards,
            reward_B if is_masking else reward_B.masked_fill(~finished_B, 0.0),
            finished_B if is_masking else torch.ones_like(finished_B),
            {
                "sampled_tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
                "rollout_s": max(rollout_s for *_, rollout_s in parts),
            },
        )

    def _written(self, places: Sequence[int], seed: int) -> tuple[list[Rollout], list[float], float]:
        """Rollouts of the problems at those places, their rewards, and the seconds of writing."""
        problems = pick_at(self._task.train, places, seed)
        started = time.perf_counter()
        rollouts = self._sampler.sample(problems, self._sampling, seeds=seeds_at(places, seed))
        rollout_s = time.perf_counter() - started
        return rollouts, [self._task.reward(rollout.problem, rollout.text) for rollout in rollouts], rollout_s

    def close(self) -> None:
        """Closes the connection to a remote sampler."""
        self._sampler.close()


def collate_written(rollouts: Sequence[Rollout], advantage_B: torch.Tensor | None = None) -> Batch:
    """One batch of the rollouts, in order, each token with its sequence's advantage; empty without a rollout."""
    if not rollouts:
        return Batch.empty()
    completions = [rollout.completion_ids for rollout in rollouts]
    advantages = None
    if advantage_B is not None:
        pairs = zip(completions, advantage_B.tolist(), strict=True)
        advantages = [np.full(len(ids), advantage, np.float32) for ids, advantage in pairs]
    return collate(
        [rollout.prompt_ids for rollout in rollouts],
        completions,
        sampled_logp_BT=[rollout.logprobs for rollout in rollouts],
        advantage_BT=advantages,
    )
