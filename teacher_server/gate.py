"""Whether work is taken: closed while the model loads, open, and closed again to drain; knows what is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from protos.errors import NotReady
from protos.records import GenerateRequest, ScoreRequest, TeacherInfo
from protos.service import GenerateStream, ScoreStream, TeacherService

_Reply = TypeVar("_Reply")


class Gate:
    """A TeacherService that answers NotReady until it is opened onto another, and again once it is closed."""

    def __init__(self) -> None:
        self._service: TeacherService | None = None
        self._reason = "the model is still loading; retry"
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_open(self) -> bool:
        """Whether new work is taken."""
        return self._service is not None

    def open(self, service: TeacherService) -> None:
        """Lets new work through to `service`."""
        self._service = service

    def close(self, reason: str) -> None:
        """Refuses new work with NotReady and this sentence; what is in flight goes on."""
        self._service = None
        self._reason = reason

    async def idle(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    async def info(self) -> TeacherInfo:
        """See TeacherService."""
        return await self._opened().info()

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        """See TeacherService."""
        async with aclosing(self._counted(self._opened().score_stream(request, timeout_s=timeout_s))) as replies:
            async for reply in replies:
                yield reply

    async def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """See TeacherService."""
        async with aclosing(self._counted(self._opened().generate_stream(request, timeout_s=timeout_s))) as replies:
            async for reply in replies:
                yield reply

    def _opened(self) -> TeacherService:
        if self._service is None:
            raise NotReady(self._reason)
        return self._service

    async def _counted(self, replies: AsyncGenerator[_Reply, None]) -> AsyncGenerator[_Reply, None]:
        self._num_in_flight += 1
        self._idle.clear()
        try:
            async with aclosing(replies):
                async for reply in replies:
                    yield reply
        finally:
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self._idle.set()
