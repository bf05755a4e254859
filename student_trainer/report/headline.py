"""The numbers that a run is judged by, as short rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.report.record import RunRecord
from student_trainer.report.series import series_of
from student_trainer.run_folder import Row

CHANGES = (
    ("Reverse KL to the teacher", "reverse_kl", "nats a token"),
    ("Overlap of the top-K lists", "overlap_ratio", "of K"),
    ("Token accuracy", "token_accuracy", "of tokens"),
)
"""Name, metric and unit of what is told as first -> last."""

TIMES = (("rollout", "rollout_s"), ("score", "score_s"), ("learn", "learn_s"))
"""The parts of a step and their metrics, in the order in which they happen."""


@dataclass(frozen=True)
class Fact:
    """One row of the headline table."""

    name: str
    value: str
    note: str = ""


def headline(record: RunRecord) -> list[Fact]:
    """The run in a few numbers; what the run did not log is left out."""
    rows, config = record.train_rows, record.config
    num_done = record.rows[-1]["step"]
    facts = [Fact("Steps", f"{num_done} of {config.steps}", "" if num_done == config.steps else "unfinished")]
    facts += _accuracy(record.rows)
    facts += [fact for name, key, unit in CHANGES for fact in _change(rows, name, key, unit)]
    if rows:
        facts.append(Fact("Tokens trained on", f"{sum(row['num_tokens'] for row in rows):,}"))
        facts.append(_step_time(rows))
    if len(scored := series_of(rows, "scored_tokens_per_s")):
        facts.append(Fact("Scored tokens a second", f"{np.median(scored.values):,.0f}", "median"))
    return facts


def _accuracy(rows: Sequence[Row]) -> list[Fact]:
    evaluated = [row for row in rows if "eval/accuracy" in row]
    ends = evaluated[:1] + evaluated[1:][-1:]
    if not ends:
        return []
    shares = [
        f"{row['eval/accuracy']:.1%} ({row['eval/accuracy_low']:.1%} to {row['eval/accuracy_high']:.1%})"
        for row in ends
    ]
    return [Fact("Held-out accuracy", " → ".join(shares), f"{_steps(ends)}; 95 % intervals")]


def _change(rows: Sequence[Row], name: str, key: str, unit: str) -> list[Fact]:
    logged = [row for row in rows if key in row]
    ends = logged[:1] + logged[1:][-1:]
    return [Fact(name, f"{' → '.join(f'{row[key]:.3g}' for row in ends)} {unit}", _steps(ends))] if ends else []


def _steps(ends: Sequence[Row]) -> str:
    return " → ".join(f"step {row['step']}" for row in ends)


def _step_time(rows: Sequence[Row]) -> Fact:
    parts = [(name, series_of(rows, key)) for name, key in TIMES]
    breakdown = ", ".join(f"{name} {np.median(part.values):.3g}" for name, part in parts if len(part))
    return Fact("Seconds a step", f"{np.median(series_of(rows, 'step_s').values):.3g} s", f"medians; {breakdown}")
