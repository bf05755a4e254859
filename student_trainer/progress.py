"""What a person sees while a run goes on: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from student_trainer.config import TrainConfig
from student_trainer.run_folder import Row

LINE_EVERY_S = 15.0
"""Between two lines where there is no terminal: often enough to see life, seldom enough to read."""

SHOWN = (("loss", "loss"), ("reverse_kl", "KL"), ("reward", "reward"), ("eval/accuracy", "held-out"))


class Progress:
    """The progress of one run, written to standard error."""

    def __init__(self, config: TrainConfig, *, start: int, quiet: bool = False) -> None:
        console = Console(file=sys.stderr, quiet=quiet)
        self._is_terminal = console.is_terminal
        self._console = console
        self._title = f"{config.stage.kind} {config.run}"
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._is_terminal,
        )
        self._task = self._bar.add_task(self._title, total=config.steps, completed=start, note="")
        self._num_done, self._num_steps = start, config.steps
        self._seen: dict[str, float] = {}
        self._last_line_s = -LINE_EVERY_S

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, row: Row) -> None:
        """One step is done; `row` is its metrics."""
        self._num_done += 1
        self._seen |= {name: row[key] for key, name in SHOWN if key in row}
        note = "  ".join(f"{name} {value:.3f}" for name, value in self._seen.items())
        self._bar.update(self._task, advance=1, note=note)
        is_last = self._num_done == self._num_steps
        if not self._is_terminal and (is_last or time.monotonic() - self._last_line_s >= LINE_EVERY_S):
            self._last_line_s = time.monotonic()
            line = f"{self._title}: step {self._num_done}/{self._num_steps}  {note}"
            self._console.print(line, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Turns off transformers' own bars and remarks, for a program that shows its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
