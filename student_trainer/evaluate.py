"""How good a student is: greedy accuracy on problems it has never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from student_trainer.config import EvalConfig
from student_trainer.distributed import gather, share
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.tasks import Problem, Task

Z_95 = 1.959963984540054
"""The 97.5th percentile of the normal distribution: a two-sided 95 % interval."""


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to held-out problems.

    Attributes:
        accuracy: mean reward.
        interval: Wilson's 95 % interval of the accuracy (Wilson 1927); exact for rewards of 0 and 1.
        well_formed: share of answers that could be read.
        truncation_rate: share that reached the budget without EOS.
        num_problems: how many were asked.
    """

    accuracy: float
    interval: tuple[float, float]
    well_formed: float
    truncation_rate: float
    num_problems: int

    def metrics(self) -> dict[str, float]:
        """By name, for the log."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/accuracy_low": self.interval[0],
            "eval/accuracy_high": self.interval[1],
            "eval/well_formed": self.well_formed,
            "eval/truncation_rate": self.truncation_rate,
        }


def evaluate(sampler: Sampler, task: Task, config: EvalConfig, *, max_new_tokens: int) -> Evaluation:
    """Answers the first `config.num_problems` held-out problems greedily; every rank answers a share of them.

    Raises:
        ValueError: the task holds out fewer problems than that.
    """
    if len(task.held_out) < config.num_problems:
        raise ValueError(
            f"eval.num_problems is {config.num_problems}, but task {task.name} holds out {len(task.held_out)}"
        )
    problems = share(task.held_out[: config.num_problems])
    mine = [
        (task.reward(r.problem, r.text), task.is_well_formed(r.problem, r.text), not r.is_finished)
        for r in greedy(sampler, problems, config.batch_size, max_new_tokens)
    ]
    rewards, well_formed, truncated = zip(*chain.from_iterable(gather(mine)), strict=True)
    accuracy = sum(rewards) / len(rewards)
    return Evaluation(
        accuracy=accuracy,
        interval=wilson_interval(accuracy, len(rewards)),
        well_formed=sum(well_formed) / len(rewards),
        truncation_rate=sum(truncated) / len(rewards),
        num_problems=len(rewards),
    )


def greedy(sampler: Sampler, problems: Sequence[Problem], batch_size: int, max_new_tokens: int) -> list[Rollout]:
    """The most likely completion of each problem, in order."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    batches = [problems[start : start + batch_size] for start in range(0, len(problems), batch_size)]
    return [rollout for batch in batches for rollout in sampler.sample(batch, params, seeds=[0] * len(batch))]


def wilson_interval(share: float, num_trials: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % for a share of `num_trials` trials."""
    z2 = Z_95**2 / num_trials
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)
