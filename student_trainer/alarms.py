"""From a run's metrics and the config's rules to alarms. What follows from an alarm is the loop's."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from student_trainer.config import Rule, WatchConfig
from student_trainer.roll_back import RollBack

SKIPPED = "skipped_steps"
"""The metric that counts the run's skipped optimiser updates."""

NOT_EVERY_STEP = ("eval/", "full/", "teacher_wait_s")
"""How the signals begin that some steps log and others do not."""


@dataclass(frozen=True)
class Alarm:
    """A signal that has been out of bounds for as long as its rule allows.

    Attributes:
        rule: the rule that it broke.
        step: at which it did.
        since: the first step of those on end in which the signal was out of bounds.
        value: of the signal at `step`, or its mean where the rule is of means.
        threshold: that it is beyond at `step`.
        num_steps: optimiser steps so far, those that were rolled back included.
        action: what follows: the rule's, or "stop" for a roll-back too many.
    """

    rule: Rule
    step: int
    since: int
    value: float
    threshold: float
    num_steps: int
    action: Literal["warn", "stop", "roll_back"]

    @property
    def sentence(self) -> str:
        """The alarm for a person."""
        rule = self.rule
        held = f" since step {self.since}" if self.since != self.step else ""
        threshold = f"{rule.side} {self.threshold:.4g}{self._reason}"
        return (
            f"step {self.step}: {rule.signal} is {self.value:.4g}, {threshold}{held}, after {self.num_steps} steps in "
            f"all{self._consequence}"
        )

    @property
    def _reason(self) -> str:
        """Where a threshold that depends on the run comes from."""
        rule = self.rule
        if rule.above_lowest is not None:
            return f" (its lowest so far and {rule.above_lowest:g})"
        if rule.errors_above_lowest is not None:
            margin = f"{rule.errors_above_lowest:g} standard errors"
            return f" (its lowest so far and {margin}, as means of {rule.for_steps} steps)"
        if rule.below_highest is not None:
            return f" ({rule.below_highest:g} of its highest so far)"
        return ""

    @property
    def _consequence(self) -> str:
        if self.action == "roll_back":
            changes = [f"{self.rule.lr_scale:g} times the learning rate"] if self.rule.lr_scale else []
            changes += [f"the loss {self.rule.loss.kind}"] if self.rule.loss else []
            return f"; back to the last checkpoint before step {self.since}, and on with {' and '.join(changes)}"
        if self.action == "stop":
            spent = "it was rolled back as often as watch.max_roll_backs allows, so " * (
                self.rule.action == "roll_back"
            )
            return f"; {spent}the run stops here, and goes on when the rule in `watch` is changed"
        return ""

    def row(self) -> dict[str, Any]:
        """The alarm as a line of alarms.jsonl."""
        return {
            "step": self.step,
            "signal": self.rule.signal,
            "value": self.value,
            "threshold": self.threshold,
            "side": self.rule.side,
            "action": self.action,
            "num_steps": self.num_steps,
            "sentence": self.sentence,
        }


@dataclass
class _Streak:
    """For how many logged steps on end a signal has been out of bounds, and its best and its noise so far."""

    rule: Rule
    length: int = 0
    since: int = 0
    is_logged: bool = False
    value: float = math.nan
    threshold: float = math.nan
    best: float = math.nan
    recent: list[tuple[int, float]] = field(default_factory=list)
    num_changes: int = 0
    square_changes: float = 0.0

    def extend(self, row: dict[str, Any]) -> None:
        rule, step = self.rule, row["step"]
        self.value, first = row.get(rule.signal, math.nan), step
        self.is_logged = not math.isnan(self.value) and step >= rule.from_step
        if not self.is_logged:
            return
        self.threshold = rule.threshold(self.best, self._error)  # NaN before there is a best: nothing is beyond it
        self._learn(step, self.value)
        if self._is_of_means and math.isfinite(self.value):
            self.value, first = self._mean, self.recent[0][0]
        if (self.value > self.threshold) if rule.side == "above" else (self.value < self.threshold):
            self.since = self.since if self.length else first
            self.length += 1
        else:
            self.length = 0

    def _learn(self, step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        if self.recent:
            self.num_changes += 1
            self.square_changes += (value - self.recent[-1][1]) ** 2
        self.recent = [*self.recent, (step, value)][-self.rule.for_steps :]
        if len(self.recent) == self.rule.for_steps:
            pick = min if self.rule.side == "above" else max
            self.best = self._mean if math.isnan(self.best) else pick(self.best, self._mean)

    @property
    def _mean(self) -> float:
        return statistics.fmean(value for _, value in self.recent)

    @property
    def _error(self) -> float:
        """The standard error of a mean, from the mean square of successive differences, twice the variance of a step,
        into which a trend hardly enters (von Neumann 1941); infinite while nothing has changed: no noise is known."""
        if not self.square_changes:
            return math.inf
        return math.sqrt(self.square_changes / (2 * self.num_changes * self.rule.for_steps))

    @property
    def _is_of_means(self) -> bool:
        return self.rule.errors_above_lowest is not None

    @property
    def num_needed(self) -> int:
        """The length at which the rule is broken."""
        return 1 if self._is_of_means else self.rule.for_steps

    @property
    def is_over(self) -> bool:
        return self.is_logged and self.length >= self.num_needed

    @property
    def may_be_out_since(self) -> float:
        """The first step of a breach that is or may yet become one; infinite when there is none."""
        if self._is_of_means and self.recent and not self.length:
            return self.recent[0][0]
        return self.since if self.length else math.inf


class Alarms:
    """The rules of a run, fed with its rows in order.

    A warning sounds once each time a signal leaves its bounds for long enough; a rule that stops or rolls back sounds
    at every step for as long as the signal stays out, so that a run that is started again stops again.

    Args:
        config: the rules; that of `max_skipped_steps` is added to them.
        rows: what the run has logged before, without the steps that it will do again.
        roll_backs: the run's so far.

    Attributes:
        last_row: the newest row; empty before the first.
    """

    def __init__(
        self, config: WatchConfig, rows: Iterable[dict[str, Any]] = (), roll_backs: Sequence[RollBack] = ()
    ) -> None:
        skipped = Rule(signal=SKIPPED, above=config.max_skipped_steps, action="stop")
        self._streaks = [_Streak(rule) for rule in (*config.rules, skipped)]
        self._num_undone = sum(roll_back.num_undone for roll_back in roll_backs)
        self._can_roll_back = len(roll_backs) < config.max_roll_backs
        self.last_row: dict[str, Any] = {}
        for row in rows:
            self._extend(row)

    def observe(self, row: dict[str, Any]) -> list[Alarm]:
        """The alarms at the next step, which logged `row`; the gravest last."""
        self._extend(row)
        return self._sounding(is_new=True)

    def standing(self) -> Alarm | None:
        """The alarm that has stopped the run and would again; None when there is none."""
        return next((alarm for alarm in self._sounding(is_new=False) if alarm.action == "stop"), None)

    @property
    def breached_since(self) -> float:
        """The first step of the oldest breach that may yet lead to a roll-back; infinite when there is none."""
        breaches = [streak.may_be_out_since for streak in self._streaks if streak.rule.action == "roll_back"]
        return min(breaches, default=math.inf)

    def _extend(self, row: dict[str, Any]) -> None:
        self.last_row = row
        for streak in self._streaks:
            streak.extend(row)

    def _sounding(self, *, is_new: bool) -> list[Alarm]:
        alarms = [
            self._alarm(streak)
            for streak in self._streaks
            if streak.is_over and (streak.rule.action != "warn" or (is_new and streak.length == streak.num_needed))
        ]
        return sorted(alarms, key=lambda alarm: ("warn", "roll_back", "stop").index(alarm.action))

    def _alarm(self, streak: _Streak) -> Alarm:
        action = streak.rule.action
        if action == "roll_back" and not self._can_roll_back:
            action = "stop"
        step = self.last_row["step"]
        return Alarm(streak.rule, step, streak.since, streak.value, streak.threshold, step + self._num_undone, action)


def unknown_signals(rules: Sequence[Rule], row: Collection[str]) -> list[str]:
    """A sentence for each rule whose signal a step has not logged, for those that are watched at every step."""
    sentences = []
    for rule in rules:
        if rule.signal not in row and not rule.signal.startswith(NOT_EVERY_STEP):
            close = difflib.get_close_matches(rule.signal, row, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            sentences.append(f"watch.rules: this run logs no {rule.signal!r}, so the rule never sounds{hint}")
    return sentences
