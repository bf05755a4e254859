"""The output folder of one probe, its truth on disk.

probe.json     what was asked of whom
raw.jsonl      everything that a model wrote or scored, one object an answer
result.json, plot.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student_trainer.config import ConfigError
from student_trainer.durable import replace_text
from student_trainer.run_folder import Row, read_rows

NUM_TOKENS = "num_tokens"
"""In each raw row: the tokens that were written or scored for it, prompts not counted."""


class ProbeFolder:
    """A probe's files; opening an earlier one of the same probe goes on with it.

    Args:
        path: the folder; made if missing.
        identity: what decides the answers: of a folder that holds others, nothing can be used.

    Attributes:
        rows: the raw rows so far, by their keys.

    Raises:
        ConfigError: the folder holds another probe, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._raw = path / "raw.jsonl"
        text = json.dumps(identity, indent=2) + "\n"
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = path / "probe.json"
            if file.exists():
                _refuse_other(path, json.loads(file.read_text()), json.loads(text))
            else:
                replace_text(file, text)
            self.rows: dict[str, Row] = {row["key"]: row for row in read_rows(self._raw)} if self._raw.exists() else {}
            # A line that a killed process cut short would be joined to the next one.
            replace_text(self._raw, "".join(map(_line, self.rows.values())))
        except OSError as error:
            raise ConfigError(f"--out {path}: {error.strerror}") from None

    @property
    def num_tokens(self) -> int:
        """Tokens written and scored so far."""
        return sum(row[NUM_TOKENS] for row in self.rows.values())

    def add(self, rows: Sequence[Row]) -> None:
        """Appends raw rows."""
        with self._raw.open("a") as file:
            file.write("".join(map(_line, rows)))
        self.rows |= {row["key"]: row for row in rows}

    def write(self, result: Mapping[str, Any], plot: bytes) -> None:
        """Writes result.json, in which what is not a number is null, and plot.png."""
        replace_text(self.path / "result.json", json.dumps(_without_nan(result), indent=2) + "\n")
        (self.path / "plot.png").write_bytes(plot)


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    match value:
        case dict():
            return {key: _without_nan(one) for key, one in value.items()}
        case list() | tuple():
            return [_without_nan(one) for one in value]
        case float() if value != value or abs(value) == float("inf"):
            return None
        case _:
            return value


def _refuse_other(path: Path, old: Row, new: Row) -> None:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    if changed := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        first = changed[0]
        raise ConfigError(
            f"--out {path} holds a probe with another {', '.join(changed)} ({first} was {before.get(first)!r} and is "
            f"{after.get(first)!r}): choose another --out, or delete it"
        )


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, one in value.items() for leaf in _leaves(one, f"{name}.{key}" if name else key)]
