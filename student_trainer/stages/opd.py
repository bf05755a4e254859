"""On-policy distillation: the student writes, a teacher scores every token, the student moves towards it.

Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, with the student's own
rollouts alone; the rollout itself is not differentiated through.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from protos.records import ScoreResult
from student_trainer import monitor
from student_trainer.collate import Batch, collate
from student_trainer.distributed import share
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.scoring import Scorer
from student_trainer.seeds import pick, rollout_seeds
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.objective import Objective
from student_trainer.tasks import Task


class Opd:
    """Rollouts of the student, scored by whatever teacher `scorer` reaches."""

    def __init__(
        self,
        task: Task,
        sampler: Sampler,
        sampling: SamplingParams,
        scorer: Scorer,
        objective: Objective,
        *,
        problems_per_step: int,
        seed: int,
    ) -> None:
        self._task = task
        self._sampler = sampler
        self._sampling = sampling
        self._scorer = scorer
        self._objective = objective
        self._problems_per_step = problems_per_step
        self._seed = seed

    def collect(self, step: int) -> Collected:
        """Step s's rollouts and the teacher's scores of them."""
        problems = share(pick(self._task.train, self._problems_per_step, step, self._seed))
        started = time.perf_counter()
        seeds = share(rollout_seeds(self._seed, step, self._problems_per_step))
        rollouts = self._sampler.sample(problems, self._sampling, seeds=seeds)
        sampled = time.perf_counter()
        results = self._scorer.score(rollouts, self._objective.wanted)
        scored = time.perf_counter()
        batch = collate_scored(rollouts, results)
        return Collected(
            batch,
            rollouts,
            {
                **self._describe(batch, rollouts),
                "rollout_s": sampled - started,
                "score_s": scored - sampled,
                "scored_tokens_per_s": batch.num_tokens / (scored - sampled),
            },
        )

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`."""
        return self._objective.loss(logits_BTV, batch)

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """See `Objective.watch`."""
        return self._objective.watch(logits_BTV, batch)

    def close(self) -> None:
        """Closes the connection to the teacher."""
        self._scorer.close()

    def _describe(self, batch: Batch, rollouts: Sequence[Rollout]) -> Metrics:
        lengths = monitor.lengths(batch.mask_BT, torch.tensor([rollout.is_finished for rollout in rollouts]))
        rewards = [self._task.reward(rollout.problem, rollout.text) for rollout in rollouts]
        return {
            "reward": sum(rewards) / len(rewards),
            "length_mean": lengths.mean,
            "length_p95": lengths.p95,
            "truncation_rate": lengths.truncation_rate,
            "hedge_frequency": monitor.hedge_frequency([rollout.text for rollout in rollouts], batch.num_tokens),
            "repeat_ratio": monitor.repeat_ratio([rollout.completion_ids.tolist() for rollout in rollouts]),
        }


def collate_scored(rollouts: Sequence[Rollout], results: Sequence[ScoreResult]) -> Batch:
    """One batch of B rollouts and their scores, in the same order."""
    return collate(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
        sampled_logp_BT=[rollout.logprobs for rollout in rollouts],
        student_top_BTK=[rollout.top_ids for rollout in rollouts],
        teacher_logp_BT=[result.sampled_logprobs for result in results],
        teacher_top_BTK=[result.top_ids for result in results],
        teacher_top_logp_BTK=[result.top_logprobs for result in results],
        teacher_candidate_logp_BTM=[result.candidate_logprobs for result in results],
    )
