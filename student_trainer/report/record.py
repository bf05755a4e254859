"""What a report knows of a run: its config, its metrics and its rollouts, as they are on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from student_trainer.config import TrainConfig, load_config
from student_trainer.run_folder import Row, read_rows


@dataclass(frozen=True)
class RunRecord:
    """One run, finished or not.

    Attributes:
        config: the resolved config.
        config_text: the same as it stands in config.toml.
        rows: metrics.jsonl; step 0 holds the evaluation before training, and every other row has gained `learn_s`, the
            seconds spent neither on rollouts nor on scores.
        rollouts: rollouts.jsonl; empty for a stage in which the student writes nothing.
        alarms: alarms.jsonl; empty when nothing was amiss.
    """

    config: TrainConfig
    config_text: str
    rows: list[Row]
    rollouts: list[Row]
    alarms: list[Row]

    @property
    def train_rows(self) -> list[Row]:
        """The optimiser steps' rows."""
        return [row for row in self.rows if row["step"] > 0]


def read_run(run: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        ValueError: the folder is not a run's, or has no metrics yet.
        ConfigError: its config.toml cannot be used.
    """
    config_file = run / "config.toml"
    if not config_file.is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.toml")
    rows = [_with_learn_s(row) for row in _rows(run / "metrics.jsonl")]
    if not rows:
        raise ValueError(f"{run} has no metrics yet: its first row is written after the evaluation before training")
    return RunRecord(
        load_config(config_file),
        config_file.read_text(),
        rows,
        _rows(run / "rollouts.jsonl"),
        _rows(run / "alarms.jsonl"),
    )


def _rows(path: Path) -> list[Row]:
    return read_rows(path) if path.exists() else []


def _with_learn_s(row: Row) -> Row:
    if row["step"] == 0:
        return row
    return row | {"learn_s": row["step_s"] - sum(row[part] for part in ("rollout_s", "score_s") if part in row)}
