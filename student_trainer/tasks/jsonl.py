"""Problems in JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from student_trainer.tasks.config import JsonlTask
from student_trainer.tasks.problem import SplitTask
from student_trainer.tasks.rows import task_of_rows


def jsonl_task(config: JsonlTask) -> SplitTask:
    """The task in `config.path` and `config.held_out_path`.

    Raises:
        ValueError: a file is missing or a line is wrong; the message names file, line and field.
    """
    held_out = None if config.held_out_path is None else _rows(config.held_out_path)
    return task_of_rows(config, config.path.stem, _rows(config.path), held_out)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file's rows; blank lines are passed over."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                yield (place := f"{path}:{line_number}"), _row(place, line)


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON {type(row).__name__}, not an object")
    if "solution" in row:
        if "reference" in row:
            raise ValueError(f"{place}: solution: `reference` is there too; give one of the two")
        row["reference"] = row.pop("solution")
    return row
