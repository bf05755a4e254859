"""On-policy distillation: the student writes, a teacher scores every token, the student moves towards it.

Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, algorithm 1; the rollout
itself is not differentiated through. Where the teacher writes a share of the data, who writes is drawn once a step, as
there: a step's monitors are of one writer's texts, and those of the student's are never mixed with another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from protos.records import ScoreResult
from student_trainer import distributed, monitor
from student_trainer.collate import Batch, collate
from student_trainer.pipeline import Pipeline
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.scoring import Scorer, Wanted
from student_trainer.seeds import WRITERS, derive_seed, pick, rollout_seeds
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.objective import Objective
from student_trainer.stages.written import Scoring
from student_trainer.tasks import Task

BY_TEACHER = "teacher_written/"
"""Before the name of every monitor of a text that the teacher wrote."""

MAX_WEIGHT = 2.0
"""Of a stale token: no token counts more than twice, whatever the weights' moves since multiply up to."""


@dataclass(frozen=True)
class FullVocabulary:
    """How often, and for how many of all ranks' rollouts of a step, the teacher gives its whole vocabulary of V ids;
    0 is never."""

    every_steps: int
    num_rollouts: int
    vocab_size: int


class Opd:
    """Rollouts of the student, scored by whatever teacher `scorer` reaches.

    Args:
        teacher_sampler: writes with the teacher's weights; needed where it writes a share.
        teacher_written: the chance a step that it does.
        current_logp: how likely the student of now finds each completion token, [B, T] in nats; needed where rollouts
            may be stale.
    """

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
        num_steps: int,
        checkpoint_every: int,
        max_staleness: int = 0,
        teacher_sampler: Sampler | None = None,
        teacher_written: float = 0.0,
        current_logp: Callable[[Batch], torch.Tensor] | None = None,
    ) -> None:
        self._task = task
        self._sampler = sampler
        self._sampling = sampling
        self._scorer = scorer
        self._objective = objective
        self._full_vocabulary = full_vocabulary
        self._problems_per_step = problems_per_step
        self._seed = seed
        self._teacher_sampler = teacher_sampler
        self._teacher_written = teacher_written
        self._current_logp = current_logp
        self._pipeline = Pipeline(
            self._begin, max_staleness=max_staleness, num_steps=num_steps, checkpoint_every=checkpoint_every
        )

    def collect(self, step: int) -> Collected:
        """Step s's rollouts, or what the teacher wrote in their place, with the teacher's scores on their way."""
        scoring, staleness = self._pipeline.take(step)
        rollouts = scoring.rollouts
        by_teacher = is_by_teacher(step, self._teacher_written, self._seed)
        batch = replace(collate_rollouts(rollouts, by_student=not by_teacher), answers_B=scoring.answers)
        metrics = {"rollout_s": scoring.rollout_s, "staleness": float(staleness)}
        if self._teacher_written > 0:
            metrics["teacher_written"] = float(by_teacher)
        late_metrics = partial(self._scoring_metrics, scoring)
        if by_teacher:
            return Collected(batch, metrics=metrics, late_metrics=late_metrics)
        return Collected(
            self._weighted(batch, staleness),
            rollouts,
            metrics,
            late_metrics=late_metrics,
            rewards=[self._task.reward(rollout.problem, rollout.text) for rollout in rollouts],
            full_vocabulary=self._scored_in_full(rollouts, step),
        )

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`; weighted by `prefix_weights` where the rollouts are stale."""
        loss_BT = self._objective.loss(logits_BTV, batch)
        return loss_BT if batch.weight_BT is None else batch.weight_BT * loss_BT

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """See `Objective.watch`; by other names where the teacher wrote, whose tokens estimate KL(q || p) instead."""
        metrics = self._objective.watch(logits_BTV, batch)
        if batch.sampled_logp_BT is not None:
            return metrics
        metrics["forward_kl"] = -metrics.pop("reverse_kl")
        return {BY_TEACHER + name: value for name, value in metrics.items()}

    def give_up(self) -> None:
        """Asks no more for the scores of what was collected last, which may be collected anew."""
        self._pipeline.give_up()

    def close(self) -> None:
        """Closes the connections to the teacher and to a remote sampler."""
        self.give_up()
        self._scorer.close()
        self._sampler.close()

    def _scoring_metrics(self, scoring: Scoring) -> Metrics:
        waited_s = self._scorer.take_waited_s()
        return scoring.metrics() | ({"teacher_wait_s": waited_s} if waited_s else {})

    def _weighted(self, batch: Batch, staleness: int) -> Batch:
        """`batch` with its weights; what the weights of now have written has none, nor what the teacher has."""
        if staleness == 0 or batch.sampled_logp_BT is None:
            return batch
        assert self._current_logp is not None
        weight_BT = prefix_weights(self._current_logp(batch), batch.sampled_logp_BT, batch.mask_BT)
        return replace(batch, weight_BT=weight_BT)

    def _begin(self, step: int) -> Scoring:
        """Writes step s's rollouts with the weights of now, or the teacher's; they are scored as each ends."""
        problems = pick(self._task.train, self._problems_per_step, step, self._seed)
        seeds = rollout_seeds(self._seed, step, self._problems_per_step)
        sampler = self._sampler
        if is_by_teacher(step, self._teacher_written, self._seed):
            assert self._teacher_sampler is not None
            sampler = self._teacher_sampler
        return Scoring(
            sampler.stream(problems, self._sampling, seeds=seeds),
            partial(self._scorer.start, wanted=self._objective.wanted),
        )

    def _scored_in_full(self, rollouts: Sequence[Rollout], step: int) -> Batch | None:
        full = self._full_vocabulary
        if not full.every_steps or (step + 1) % full.every_steps:
            return None
        before = distributed.share(range(self._problems_per_step))[0] * self._sampling.num_samples
        first = rollouts[: max(0, full.num_rollouts - before)]
        if not first:
            return None
        wanted = Wanted(vocab_size=full.vocab_size)
        return collate_scored(first, self._scorer.score(first, wanted))


def is_by_teacher(step: int, share: float, seed: int) -> bool:
    """Whether the teacher writes step s: with the chance `share`, drawn anew each step."""
    return bool(np.random.default_rng(derive_seed(seed, WRITERS, step)).random() < share)


def prefix_weights(logp_BT: torch.Tensor, behaviour_logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """w_t = min(prod_{i<t} p(y_i) / mu(y_i), MAX_WEIGHT), [B, T], a constant; 1 at every first token and on padding.

    A distillation loss at position t is a function of the prefix y_<t, which was drawn from mu, the weights that wrote
    the rollout; the product is the prefix's importance weight (per-decision importance sampling: Precup et al. 2000,
    "Eligibility Traces for Off-Policy Policy Evaluation", section 3), so that E_mu[w_t L_t] = E_p[L_t] before the
    truncation, which trades bias for variance as in V-trace (Espeholt et al. 2018, arXiv:1802.01561, section 4.1). The
    ratio of token t itself would change nothing in expectation: L_t already sums over that token. That data may lag
    behind by a bounded number of steps is AReaL's (Fu et al. 2025, arXiv:2505.24298).
    """
    log_ratio_BT = torch.where(mask_BT, logp_BT.detach() - behaviour_logp_BT, 0.0)
    before_BT = log_ratio_BT.cumsum(-1) - log_ratio_BT
    return torch.where(mask_BT, before_BT.exp().clamp_max(MAX_WEIGHT), 1.0)


def collate_scored(rollouts: Sequence[Rollout], results: Sequence[ScoreResult]) -> Batch:
    """One batch of B rollouts of the student and their scores, in the same order."""
    return collate_rollouts(rollouts, by_student=True).with_scores(results)


def collate_rollouts(rollouts: Sequence[Rollout], *, by_student: bool) -> Batch:
    """One batch of B rollouts.

    Args:
        by_student: whether their log-probs are those with which the student sampled them.
    """
    return collate(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
        sampled_logp_BT=[rollout.logprobs for rollout in rollouts] if by_student else None,
        student_top_BTK=[rollout.top_ids for rollout in rollouts],
        decile_BT=[monitor.deciles(len(rollout.completion_ids)) for rollout in rollouts],
    )
