"""The operations of a teacher as protocols: what a server offers and what a client reaches."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from typing import Protocol, runtime_checkable

from protos.errors import TeacherError
from protos.records import (
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
    ServedTeacher,
    TeacherInfo,
    WeightsUpdate,
)

ScoreStream = AsyncGenerator[tuple[int, ScoreResult | TeacherError], None]
GenerateStream = AsyncGenerator[tuple[int, GenerateResult | TeacherError], None]
"""Each item's index and outcome as it completes, in any order."""


class TeacherService(Protocol):
    """The three operations: what a server's core offers and what a client reaches, with equal meaning."""

    async def info(self) -> TeacherInfo:
        """What this teacher is."""
        ...

    def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        """Each item's index and outcome as it completes, in any order.

        Args:
            timeout_s: seconds until the caller no longer wants the answer.

        Raises:
            TeacherError: the request was refused whole, or nothing of it succeeded.
        """
        ...

    def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """As `score_stream`."""
        ...


class TeacherAdmin(Protocol):
    """What changes the teachers themselves."""

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """What is served once the new weights are: in-flight requests finish on the old ones, later ones wait.

        Args:
            chunks: one safetensors file's bytes in order; none where `update` has a path or a transfer.
            timeout_s: until the caller no longer wants the change; a change that has begun by then is finished.

        Raises:
            TeacherError: the old weights are still served, unless the message says that the engine is gone.
        """
        ...

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """The adapter that is no longer served; what is in flight finishes on it."""
        ...


@runtime_checkable
class Detokenizer(Protocol):
    """A teacher that cannot say which tokenizer it has, but can say what ids mean to it."""

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of these ids together, special tokens included."""
        ...
