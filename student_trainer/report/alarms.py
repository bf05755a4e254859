"""The alarms of a run as marks on its plots: one mark for each signal's stretch of alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from student_trainer.run_folder import Row

MAX_MARKS = len(ascii_uppercase)
"""Marks are letters; a run with more stretches of alarms than that has been read long before the last."""

STRETCH_SHARE = 0.05
"""Alarms of one signal no further apart than this share of the run's steps are one stretch."""


@dataclass(frozen=True)
class Mark:
    """A stretch of one signal's alarms, from `step` to `last_step`; `sentence` and `action` are the first one's."""

    letter: str
    signal: str
    step: int
    last_step: int
    count: int
    action: str
    sentence: str


def marks_of(alarms: Sequence[Row], num_steps: int) -> list[Mark]:
    """The stretches by their first step, at most MAX_MARKS of them."""
    stretches: list[list[Row]] = []
    for alarm in sorted(alarms, key=lambda alarm: alarm["step"]):
        same = [stretch for stretch in stretches if stretch[-1]["signal"] == alarm["signal"]]
        if same and alarm["step"] - same[-1][-1]["step"] <= max(1, STRETCH_SHARE * num_steps):
            same[-1].append(alarm)
        else:
            stretches.append([alarm])
    return [
        Mark(
            letter,
            stretch[0]["signal"],
            stretch[0]["step"],
            stretch[-1]["step"],
            len(stretch),
            stretch[0]["action"],
            stretch[0]["sentence"],
        )
        for letter, stretch in zip(ascii_uppercase, stretches, strict=False)
    ]
