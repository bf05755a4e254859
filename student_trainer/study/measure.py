"""What the demos measure, on problems that no model in them was trained on: accuracy, and closeness to a teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from student_trainer.config import ModelConfig
from student_trainer.rollout.base import Sampler, SamplingParams
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.run_folder import read_rows
from student_trainer.scoring import Scorer, Wanted
from student_trainer.seeds import rollout_seeds
from student_trainer.student import load_student
from student_trainer.tasks import Problem


@dataclass(frozen=True)
class Closeness:
    """Per completion token of the student's own rollouts.

    Attributes:
        reverse_kl: KL(student || teacher) in nats, the unbiased estimate mean of log p(y) - log q(y).
        standard_error: of `reverse_kl`, with rollouts, not tokens, as the independent unit.
        overlap_ratio: mean |TopK(p) ∩ TopK(q)| / K.
        num_tokens: tokens scored.
        tokens_per_s: scored, over the network.
    """

    reverse_kl: float
    standard_error: float
    overlap_ratio: float
    num_tokens: int
    tokens_per_s: float


def measure_closeness(
    sampler: Sampler, scorer: Scorer, problems: Sequence[Problem], params: SamplingParams, *, seed: int
) -> Closeness:
    """Samples one batch and has it scored; `params.top_ids` is K, and `params.temperature` must be the scorer's."""
    rollouts = sampler.sample(problems, params, seeds=rollout_seeds(seed, 0, len(problems)))
    started = time.perf_counter()
    results = scorer.score(rollouts, Wanted(teacher_top_k=params.top_ids))
    seconds = time.perf_counter() - started
    pairs = list(zip(rollouts, results, strict=True))
    log_ratios = np.array([float((a.logprobs - b.sampled_logprobs).sum()) for a, b in pairs])
    lengths = np.array([len(a.completion_ids) for a, _ in pairs])
    reverse_kl = log_ratios.sum() / lengths.sum()
    # Standard error of a ratio of sums over independent rollouts (the delta method).
    residuals = log_ratios - reverse_kl * lengths
    standard_error = np.sqrt((residuals**2).sum() * len(pairs) / (len(pairs) - 1)) / lengths.sum()
    shared = sum(_num_shared(a.top_ids, b.top_ids) for a, b in pairs)
    return Closeness(
        reverse_kl=float(reverse_kl),
        standard_error=float(standard_error),
        overlap_ratio=shared / (int(lengths.sum()) * params.top_ids),
        num_tokens=int(lengths.sum()),
        tokens_per_s=float(lengths.sum() / seconds),
    )


def load_sampler(model: Path) -> TransformersSampler:
    """A sampler of the model in a folder."""
    student = load_student(ModelConfig(path=str(model)))
    return TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)


def median_of(run: Path, metric: str) -> float:
    """The median of a metric over the steps of a run."""
    return float(np.median([row[metric] for row in read_rows(run / "metrics.jsonl") if metric in row]))


def _num_shared(a_TK: np.ndarray, b_TK: np.ndarray) -> int:
    return int((a_TK[:, :, None] == b_TK[:, None, :]).sum())
