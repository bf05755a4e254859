"""What makes a teacher the same teacher from the first step of a run to the last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from protos.records import TeacherInfo
from student_trainer.distributed import by_main
from student_trainer.durable import replace_text

TEACHER_FILE = "teacher.json"
"""In the run folder."""

SHOWN_CHARS = 60
"""Of a value in an error: enough to tell two apart."""


class TeacherMismatch(ValueError):
    """The teacher cannot score this student, or is not the one that it was; the message says what differs."""


@dataclass(frozen=True)
class TeacherIdentity:
    """What decides a teacher's log-probs; engines may differ, as they are tested to agree.

    Attributes:
        teacher: the served name.
        weights_version: of its weights.
        tokenizer: the fingerprint's fields by name.
    """

    model: str
    revision: str
    dtype: str
    teacher: str
    weights_version: int
    tokenizer: dict[str, str]

    @classmethod
    def of(cls, info: TeacherInfo) -> Self:
        """Of the teacher that a server names first."""
        tokenizer = {name: str(value) for name, value in asdict(info.tokenizer).items()}
        return cls(info.model, info.revision, info.dtype, info.teachers[0], info.weights_version, tokenizer)

    def changes(self, now: TeacherIdentity) -> list[str]:
        """What is no longer as it was, in a few words each; empty when it is the same teacher."""
        pairs = [(f.name, getattr(self, f.name), getattr(now, f.name)) for f in fields(self) if f.name != "tokenizer"]
        pairs += [(f"tokenizer.{name}", was, now.tokenizer.get(name, "")) for name, was in self.tokenizer.items()]
        return [f"{name} was {_shown(was)} and is {_shown(value)}" for name, was, value in pairs if was != value]

    def hold(self, file: Path) -> None:
        """Writes the identity when `file` is not there; compares with it when it is.

        Raises:
            TeacherMismatch: the file holds another teacher's.
        """
        by_main(lambda: self._hold(file))

    def _hold(self, file: Path) -> None:
        if not file.exists():
            replace_text(file, json.dumps(asdict(self), indent=2) + "\n")
            return
        changes = TeacherIdentity(**json.loads(file.read_text())).changes(self)
        if changes:
            raise TeacherMismatch(
                f"the teacher is not the one that this run began with: {'; '.join(changes)}; bring that one back, or "
                f"delete {file} to go on with this one"
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
