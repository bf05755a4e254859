"""What a person sees while a run goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from student_trainer.config import TrainConfig
from student_trainer.run_folder import Row

LINE_EVERY_S = 15.0
"""Between two lines where there is no terminal: often enough to see life, seldom enough to read."""

SHOWN = (("loss", "loss"), ("reverse_kl", "KL"), ("reward", "reward"), ("eval/accuracy", "held-out"))

RECENT_STEPS = 50
"""Over which the rates are taken: long enough to hold an evaluation now and then, short enough to follow a change."""


class Rates:
    """How fast the last steps were, by a clock that starts at `now_s`; what happens between steps counts too."""

    def __init__(self, now_s: float) -> None:
        self._ends = deque([(now_s, 0)], maxlen=RECENT_STEPS + 1)

    def add(self, now_s: float, num_tokens: int) -> None:
        """One more step, of `num_tokens` tokens learnt from, ended at `now_s` seconds."""
        self._ends.append((now_s, num_tokens))

    @property
    def step_s(self) -> float:
        """Mean seconds a step; 0 before the first."""
        return (self._ends[-1][0] - self._ends[0][0]) / max(1, len(self._ends) - 1)

    def describe(self, num_left: int) -> str:
        """Steps a second (or seconds a step, where that is slower), tokens a second, and the time left."""
        step_s = self.step_s
        if not step_s:
            return ""
        steps = f"{1 / step_s:.1f} steps/s" if step_s < 1 else f"{step_s:.1f} s/step"
        num_tokens = sum(num for _, num in list(self._ends)[1:])
        tokens_per_s = num_tokens / (step_s * (len(self._ends) - 1))
        return f"{steps}  {tokens_per_s:,.0f} tokens/s  {duration(num_left * step_s)} left"


def duration(seconds: float) -> str:
    """In the two largest units: 45 s, 3 min 20 s, 2 h 05 min, 1 d 03 h."""
    num_s = round(seconds)
    if num_s < 60:
        return f"{num_s} s"
    if num_s < 3600:
        return f"{num_s // 60} min {num_s % 60:02} s"
    if num_s < 86400:
        return f"{num_s // 3600} h {num_s % 3600 // 60:02} min"
    return f"{num_s // 86400} d {num_s % 86400 // 3600:02} h"


class Counter:
    """How far a count of `unit`s has come, written to standard error."""

    def __init__(self, title: str, unit: str, total: int, *, start: int, quiet: bool = False) -> None:
        console = Console(file=sys.stderr, quiet=quiet)
        self._is_terminal = console.is_terminal
        self._console = console
        self._title = title
        self._unit = unit
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, note="")
        self.num_done, self._total = start, total
        self._last_line_s = -LINE_EVERY_S

    @property
    def num_left(self) -> int:
        """Up to the total."""
        return self._total - self.num_done

    def advance(self, num: int, note: str) -> None:
        """So many more are done; `note` says what else there is to know."""
        self.num_done += num
        self._bar.update(self._task, advance=num, note=note)
        is_last = self.num_done == self._total
        if not self._is_terminal and (is_last or time.monotonic() - self._last_line_s >= LINE_EVERY_S):
            self._last_line_s = time.monotonic()
            self.say(f"{self._title}: {self._unit} {self.num_done}/{self._total}  {note}")

    def say(self, line: str) -> None:
        """One line of its own."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class Progress:
    """The progress of one run."""

    def __init__(self, config: TrainConfig, *, start: int, quiet: bool = False) -> None:
        self._counter = Counter(f"{config.stage.kind} {config.run}", "step", config.steps, start=start, quiet=quiet)
        self._seen: dict[str, float] = {}
        self._rates = Rates(time.monotonic())

    def __enter__(self) -> Self:
        self._counter.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._counter.__exit__(*exc_info)

    def advance(self, row: Row) -> None:
        """One step is done; `row` is its metrics."""
        self._seen |= {name: row[key] for key, name in SHOWN if key in row}
        self._rates.add(time.monotonic(), row["num_tokens"])
        rates = self._rates.describe(self._counter.num_left - 1)
        self._counter.advance(1, "  ".join([rates, *(f"{name} {value:.3f}" for name, value in self._seen.items())]))


def quiet_libraries() -> None:
    """Turns off transformers' own bars and remarks, for a program that shows its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
