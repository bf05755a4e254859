"""The run folder, a run's truth on disk.

config.toml       the resolved config
metrics.jsonl     one object a step; step 0 is the evaluation before training
rollouts.jsonl    a few rollouts a step, for people to read
checkpoints/      see `checkpoint`
plots/*.png, report.html
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from student_trainer import checkpoint
from student_trainer.config import ConfigError, TrainConfig, dump_config
from student_trainer.distributed import is_main

Row = dict[str, Any]

MAY_CHANGE = ("teacher.", "checkpoint.", "rollouts_logged")
"""Keys that a resumed run may change without changing its numbers: where the teacher is, and what is kept on disk."""


class RunFolder:
    """One run's files; opening an earlier run's folder goes on with it, wherever its teacher has moved (MAY_CHANGE).

    Of several ranks the first alone writes, and refuses another run's folder for all.

    Raises:
        ConfigError: the folder holds a run of another config, or cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.run)
        self.checkpoints = self.path / "checkpoints"
        self._metrics = self.path / "metrics.jsonl"
        self._rollouts = self.path / "rollouts.jsonl"
        text = dump_config(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.toml"
            if is_main() and file.exists():
                _refuse_other_config(self.path, tomllib.loads(file.read_text()), tomllib.loads(text))
            if is_main():
                file.write_text(text)
        except OSError as error:
            raise ConfigError(f"run folder {self.path}: {error.strerror}") from None

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoint.found(self.checkpoints)
        return found[-1] if found else None

    def forget_after(self, num_steps: int) -> None:
        """Drops what was logged after `num_steps` steps, which will be done again; -1 drops step 0 too."""
        if not is_main():
            return
        for path in (self._metrics, self._rollouts):
            if path.exists():
                rows = [row for row in read_rows(path) if row["step"] <= num_steps]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
                partial.replace(path)

    def log(self, row: Row) -> None:
        """Appends one step's metrics."""
        _append(self._metrics, [row])

    def log_rollouts(self, rows: list[Row]) -> None:
        """Appends a step's sampled rollouts."""
        _append(self._rollouts, rows)

    def metrics(self) -> list[Row]:
        """Every step's metrics so far."""
        return read_rows(self._metrics) if self._metrics.exists() else []


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON Lines file; a last line cut short by a killed process is left out."""
    rows: list[Row] = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        rows.append(json.loads(line))
    return rows


def _append(path: Path, rows: list[Row]) -> None:
    if not is_main():
        return
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


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
