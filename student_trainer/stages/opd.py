"""On-policy distillation: the student writes, a teacher scores every token, the student moves towards it.

Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, with the student's own
rollouts alone; the rollout itself is not differentiated through.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protos.records import ScoreResult
from student_trainer import monitor
from student_trainer.collate import Batch, collate
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.scoring import Scorer, Wanted
from student_trainer.seeds import ROLLOUTS, derive_seed, pick
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.objective import Objective
from student_trainer.tasks import Task


@dataclass(frozen=True)
class FullVocabulary:
    """How often, and for how many of a step's rollouts, the teacher gives its whole vocabulary of V ids; 0 is never."""

    every_steps: int
    num_rollouts: int
    vocab_size: int


class Opd:
    """Rollouts of the student, scored by whatever teacher `scorer` reaches."""

    def __init__(
        self,
        task: Task,
        sampler: Sampler,
        sampling: SamplingParams,
        scorer: Scorer,
        objective: Objective,
        full_vocabulary: FullVocabulary,
        *,
        problems_per_step: int,
        seed: int,
    ) -> None:
        self._task = task
        self._sampler = sampler
        self._sampling = sampling
        self._scorer = scorer
        self._objective = objective
        self._full_vocabulary = full_vocabulary
        self._problems_per_step = problems_per_step
        self._seed = seed

    def collect(self, step: int) -> Collected:
        """Step s's rollouts and the teacher's scores of them."""
        problems = pick(self._task.train, self._problems_per_step, step, self._seed)
        started = time.perf_counter()
        rollouts = self._sampler.sample(problems, self._sampling, seed=derive_seed(self._seed, ROLLOUTS, step))
        sampled = time.perf_counter()
        results = self._scorer.score(rollouts, self._objective.wanted)
        scored = time.perf_counter()
        batch = collate_scored(rollouts, results)
        waited_s = self._scorer.take_waited_s()
        return Collected(
            batch,
            rollouts,
            {
                "rollout_s": sampled - started,
                "score_s": scored - sampled,
                "scored_tokens_per_s": batch.num_tokens / (scored - sampled),
                **({"teacher_wait_s": waited_s} if waited_s else {}),
            },
            full_vocabulary=self._scored_in_full(rollouts, step),
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

    def _scored_in_full(self, rollouts: Sequence[Rollout], step: int) -> Batch | None:
        full = self._full_vocabulary
        if not full.every_steps or (step + 1) % full.every_steps:
            return None
        first = rollouts[: full.num_rollouts]
        wanted = Wanted(teacher_top_k=full.vocab_size)
        return collate_scored(first, self._scorer.score(first, wanted))


def collate_scored(rollouts: Sequence[Rollout], results: Sequence[ScoreResult]) -> Batch:
    """One batch of B rollouts and their scores, in the same order."""
    entropies = [result.entropy for result in results if result.entropy is not None]
    return collate(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
        sampled_logp_BT=[rollout.logprobs for rollout in rollouts],
        student_top_BTK=[rollout.top_ids for rollout in rollouts],
        teacher_logp_BT=[result.sampled_logprobs for result in results],
        teacher_top_BTK=[result.top_ids for result in results],
        teacher_top_logp_BTK=[result.top_logprobs for result in results],
        teacher_candidate_logp_BTM=[result.candidate_logprobs for result in results],
        teacher_entropy_BT=entropies or None,
        decile_weight_BTD=monitor.decile_weights([len(rollout.completion_ids) for rollout in rollouts]),
    )
