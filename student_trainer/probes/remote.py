"""A model behind a URL, for the probes: what it scores and how it goes on. Knows the contract, no probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from protos.credentials import Tls
from protos.fingerprint import differences
from protos.records import GenerateItem, GenerateResult, ScoreItem, ScoreResult, TokenizerFingerprint
from student_trainer.client_thread import ClientThread
from student_trainer.config import TeacherConfig
from student_trainer.teacher_identity import TeacherMismatch

Item = TypeVar("Item")


class RemoteModel:
    """The model at a URL; `info` is what it said of itself, `url` where it is.

    Args:
        config: where it is, and how long one request may take.

    Raises:
        TeacherError: it could not be asked.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.url = config.url
        self._timeout_s = config.timeout_s
        self._client = ClientThread(config.url, Tls(ca=config.ca) if config.ca else None)
        self.info = self._client.info

    def fit(self, student: TokenizerFingerprint, *, num_tokens: int, temperature: float) -> None:
        """Refuses a model that cannot read what the student writes.

        Args:
            student: the fingerprint of the student's tokenizer.
            num_tokens: of the longest prompt and completion.
            temperature: of the log-probs that it will be asked for.

        Raises:
            TeacherMismatch: the message says everything that does not fit.
        """
        info = self.info
        problems = differences(info.tokenizer, student)
        if num_tokens > info.max_context_tokens:
            problems.append(f"prompt and completion take {num_tokens} tokens, it reads {info.max_context_tokens}")
        if temperature != 1 and not info.exact_temperature:
            problems.append(f"temperature {temperature} is not exact there, only 1.0 is: set rollout.temperature to 1")
        if "candidates" not in info.supports:
            problems.append("it cannot score ids of the caller's choice")
        if problems:
            raise TeacherMismatch(f"{self.url} does not fit this student:\n  " + "\n  ".join(problems))

    def generate(self, items: Sequence[GenerateItem]) -> list[GenerateResult]:
        """Continuations, one result an item, in order.

        Raises:
            TeacherError: any item failed.
        """
        return [
            result
            for part in self._parts(items)
            for result in self._client.wait(self._client.teacher.generate(part, timeout_s=self._timeout_s))
        ]

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Scores, one result an item, in order.

        Raises:
            TeacherError: any item failed.
        """
        return [
            result
            for part in self._parts(items)
            for result in self._client.wait(self._client.teacher.score(part, timeout_s=self._timeout_s))
        ]

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def _parts(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        limit = self.info.max_items
        return [items[start : start + limit] for start in range(0, len(items), limit)]
