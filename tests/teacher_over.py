"""A client in front of another, which its subclasses make different in one way; what tests of its callers stand on."""

from __future__ import annotations

from collections.abc import AsyncIterable

from protos.client import Teacher
from protos.records import GenerateRequest, ScoreRequest, ServedTeacher, TeacherInfo, WeightsUpdate
from protos.service import GenerateStream, ScoreStream


class TeacherOver(Teacher):
    """A real teacher behind another; closing it closes the inner one."""

    def __init__(self, inner: Teacher) -> None:
        self._inner = inner

    @property
    def url(self) -> str:
        return self._inner.url

    async def info(self) -> TeacherInfo:
        return await self._inner.info()

    def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        return self._inner.score_stream(request, timeout_s=timeout_s)

    def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        return self._inner.generate_stream(request, timeout_s=timeout_s)

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        return await self._inner.update_weights(update, chunks, timeout_s=timeout_s)

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        return await self._inner.unload(teacher, timeout_s=timeout_s)

    async def aclose(self) -> None:
        await self._inner.aclose()
