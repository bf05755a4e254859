"""The run folder, a run's truth on disk.

config.toml         the resolved config
teacher.json        what the teacher was when the run began; see `steady_teacher`
metrics.jsonl       one object a step; step 0 is the evaluation before training
rollouts.jsonl      a few rollouts a step, for people to read
alarms.jsonl        one object an alarm; see `alarms`
roll_backs.jsonl    one object a roll-back, and rolled_back.jsonl the metrics of the steps that it undid
checkpoints/        see `checkpoint`
plots/*.png, report.html
"""

from __future__ import annotations

import json
import logging
import tomllib
from pathlib import Path
from typing import Any, Protocol

from student_trainer import checkpoint
from student_trainer.alarms import Alarm
from student_trainer.config import ConfigError, TrainConfig, dump_config
from student_trainer.distributed import is_main
from student_trainer.durable import flush, replace_text
from student_trainer.manifest import damage
from student_trainer.roll_back import RollBack
from student_trainer.stopped import StoppedByRule

Row = dict[str, Any]

MAY_CHANGE = ("teacher.", "checkpoint.", "watch.", "rollouts_logged", "tracking.")
"""Keys that a resumed run may change without changing its numbers: where the teacher is, what is kept where, and what
is watched."""

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears of each row of metrics.jsonl and alarms.jsonl once it is on disk."""

    def log(self, row: Row) -> None:
        """One step's metrics."""
        ...

    def alarm(self, row: Row) -> None:
        """One alarm."""
        ...


class RunFolderError(ValueError):
    """The run's files cannot be written or trusted; what was complete before is untouched."""


class RunFolder:
    """One run's files; opening an earlier run's folder goes on with it, wherever its teacher has moved (MAY_CHANGE).

    Raises:
        ConfigError: the folder holds a run of another config, or cannot be written.
        RunFolderError: from any method: the disk is full, or took what was written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.run)
        self.checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"
        self._rollouts = self.path / "rollouts.jsonl"
        self._alarms = self.path / "alarms.jsonl"
        self._roll_backs = self.path / "roll_backs.jsonl"
        self._rolled_back = self.path / "rolled_back.jsonl"
        self.listeners: list[Listener] = []
        text = dump_config(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.toml"
            if file.exists():
                _refuse_other_config(self.path, tomllib.loads(file.read_text()), tomllib.loads(text))
            replace_text(file, text)
        except OSError as error:
            raise ConfigError(f"run folder {self.path}: {error.strerror}") from None

    def intact_checkpoint(self) -> Path | None:
        """The newest checkpoint whose checksums hold, None before the first; damaged ones are put aside.

        Raises:
            RunFolderError: there are checkpoints, and every one is damaged; or what is not whole cannot be put away.
        """
        faults: list[str] = []
        try:
            checkpoint.sweep(self.checkpoints)
            for path in reversed(checkpoint.found(self.checkpoints)):
                fault = damage(path)
                if not fault:
                    if faults:
                        logger.warning("%s; going on from %s", "; ".join(faults), path.name)
                    return path
                faults.append(f"{path} is damaged: {fault}")
                path.rename(path.with_name(f"damaged-{path.name}"))
        except OSError as error:
            raise self._full(self.checkpoints, error) from None
        if faults:
            raise RunFolderError(
                f"{'; '.join(faults)}; no checkpoint is whole: put one back from a copy, or choose another `run`"
            )
        return None

    def forget_after(self, num_steps: int) -> None:
        """Drops what was logged after `num_steps` steps, which will be done again; -1 drops step 0 too."""
        for path in (self._metrics, self._rollouts):
            self._keep(path, [row for row in _rows(path) if row["step"] <= num_steps])
        # Alarms count all steps: those that led to a roll-back stay.
        num_in_all = num_steps + sum(roll_back.num_undone for roll_back in self.roll_backs())
        self._keep(self._alarms, [row for row in _rows(self._alarms) if row["num_steps"] <= num_in_all])

    def log(self, row: Row) -> None:
        """Appends one step's metrics. Of several processes the first alone writes, here and to every log."""
        self._append(self._metrics, [row])
        for listener in self.listeners:
            listener.log(row)

    def log_rollouts(self, rows: list[Row]) -> None:
        """Appends a step's sampled rollouts."""
        self._append(self._rollouts, rows)

    def flush(self) -> None:
        """Waits until the logs are on disk: before a checkpoint, which counts their steps as done."""
        for path in (self._metrics, self._rollouts, self._alarms) if is_main() else ():
            try:
                if path.exists():
                    flush(path)
            except OSError as error:
                raise self._full(path, error) from None

    def log_alarm(self, row: Row) -> None:
        """Appends one alarm: `step`, `signal`, `value`, `threshold`, `side`, `action`, `num_steps`, `sentence`."""
        self._append(self._alarms, [row])
        for listener in self.listeners:
            listener.alarm(row)

    def metrics(self) -> list[Row]:
        """Every step's metrics so far."""
        return _rows(self._metrics)

    def roll_backs(self) -> list[RollBack]:
        """Every roll-back so far."""
        return [RollBack(**row) for row in _rows(self._roll_backs)]

    def roll_back(self, alarm: Alarm) -> None:
        """Goes back to the last checkpoint from before the breach, with what the alarm's rule changes.

        Killed before the roll-back is on disk, a run does the undone steps again and comes to the same end.

        Raises:
            StoppedByRule: no such checkpoint is left.
        """
        found = checkpoint.found(self.checkpoints)
        good = [path for path in found if checkpoint.num_steps_of(path) < alarm.since]
        if not good:
            raise StoppedByRule(f"{alarm.sentence}; but no checkpoint from before it is left, so the run stops here")
        for path in found[len(good) :]:
            checkpoint.remove(path)
        loss = alarm.rule.loss.model_dump(mode="json") if alarm.rule.loss else None
        to_step = checkpoint.num_steps_of(good[-1])
        roll_back = RollBack(alarm.step, to_step, alarm.sentence, alarm.rule.lr_scale, loss)
        done = self.roll_backs()
        undone = [{"roll_back": len(done) + 1, **row} for row in self.metrics() if row["step"] > to_step]
        kept = [row for row in _rows(self._rolled_back) if row["roll_back"] <= len(done)]
        self._write(self._rolled_back, [*kept, *undone])
        self._write(self._roll_backs, [one.row() for one in (*done, roll_back)])
        self.forget_after(to_step)

    def _keep(self, path: Path, rows: list[Row]) -> None:
        if path.exists():
            self._write(path, rows)

    def _write(self, path: Path, rows: list[Row]) -> None:
        try:
            replace_text(path, _lines(rows))
        except OSError as error:
            raise self._full(path, error) from None

    def _append(self, path: Path, rows: list[Row]) -> None:
        if not is_main():
            return
        try:
            with path.open("a") as file:
                file.write(_lines(rows))
        except OSError as error:
            raise self._full(path, error) from None

    def _full(self, path: Path, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"{path} cannot be written: {error.strerror}; the last checkpoint is whole: mend the disk and run the "
            "same command to go on"
        )


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON Lines file; a last line cut short by a killed process is left out."""
    rows: list[Row] = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        rows.append(json.loads(line))
    return rows


def _rows(path: Path) -> list[Row]:
    return read_rows(path) if path.exists() else []


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _refuse_other_config(path: Path, old: Row, new: Row) -> None:
    changed = {key for key, _ in _flat(old).items() ^ _flat(new).items() if not key.startswith(MAY_CHANGE)}
    if changed:
        keys = ", ".join(sorted(changed))
        raise ConfigError(f"run folder {path} holds a run with another {keys}: choose another `run`, or delete it")


def _flat(tables: Row, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = repr(value)
    return flat
