"""Where in a completion the student is unsure: its entropy by position, in the first, middle and last steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np

from student_trainer.report.series import Float64
from student_trainer.run_folder import Row

PREFIX = "entropy_decile_"
"""Of the metrics: the position's number, from 0, follows."""

MAX_STEPS = 20
"""Behind one profile: single steps are noisy, and a long stretch would blur what changed."""


@dataclass(frozen=True)
class Profile:
    """The entropy by position, float [D] in nats, mean over the logged steps `first` to `last`.

    NaN at a position at which no completion of those steps had a token.
    """

    label: str
    first: int
    last: int
    entropy_D: Float64

    @property
    def steps(self) -> str:
        """The steps in words."""
        return f"steps {self.first} to {self.last}" if self.last > self.first else f"step {self.first}"


def profiles_of(rows: Sequence[Row]) -> list[Profile]:
    """The first, the middle and the last steps, which share none, or each step of two; empty where none was logged."""
    logged = [row for row in rows if f"{PREFIX}0" in row]
    if len(logged) < 3:
        return [_profile([row], f"step {row['step']}") for row in logged]
    longest = min(MAX_STEPS, len(logged) // 3)
    middle = (len(logged) - longest) // 2
    stretches = (logged[:longest], logged[middle : middle + longest], logged[-longest:])
    return [_profile(stretch) for stretch in stretches]


def describe(profile: Profile) -> str:
    """The profile in words, for those who do not see the plot."""
    known = [f"{value:.3g}" if np.isfinite(value) else "none" for value in profile.entropy_D]
    return f"{profile.label}: {', '.join(known)}."


def _profile(rows: Sequence[Row], label: str = "") -> Profile:
    keys = list(takewhile(lambda key: key in rows[0], (f"{PREFIX}{d}" for d in count())))
    value_SD = np.array([[row.get(key, np.nan) for key in keys] for row in rows], float)
    # `stages.watch.full_row` gives exactly 0 where no completion had a token.
    is_known_SD = np.isfinite(value_SD) & (value_SD != 0)
    num_known_D = is_known_SD.sum(0)
    sum_D = np.where(is_known_SD, value_SD, 0.0).sum(0)
    entropy_D = np.divide(sum_D, num_known_D, out=np.full(len(keys), np.nan), where=num_known_D > 0)
    profile = Profile(label, rows[0]["step"], rows[-1]["step"], entropy_D)
    return profile if label else Profile(profile.steps, profile.first, profile.last, entropy_D)
