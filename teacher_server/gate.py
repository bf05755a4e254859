"""Whether work is taken: closed while the model loads, open, and closed again to drain; knows what is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp

from protos.errors import InvalidRequest, NotReady
from protos.records import GenerateRequest, ScoreRequest, ServedTeacher, TeacherInfo, WeightsUpdate
from protos.service import GenerateStream, ScoreStream, TeacherAdmin


class Core(Protocol):
    """A TeacherService that is told who asks, to be fair between clients."""

    async def info(self) -> TeacherInfo:
        """See TeacherService."""
        ...

    def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None, client: str = "") -> ScoreStream:
        """See TeacherService; `client` names who asks."""
        ...

    def generate_stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> GenerateStream:
        """See TeacherService; `client` names who asks."""
        ...


@dataclass(frozen=True)
class Opened:
    """What an open gate leads to; `openai` answers stock clients, where the engine has such an application, and `admin`
    changes the teachers, where the model can be changed.
    """

    core: Core
    openai: ASGIApp | None
    admin: TeacherAdmin | None

    def changed_by(self) -> TeacherAdmin:
        """`admin`; InvalidRequest where there is none."""
        if self.admin is None:
            raise InvalidRequest("the teachers of this server cannot be changed: its model is not in safetensors files")
        return self.admin


class Gate:
    """A Core and TeacherAdmin that answers NotReady until it is opened onto others, and again once it is closed."""

    def __init__(self) -> None:
        self._opened: Opened | None = None
        self._reason = "the model is still loading; retry"
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_open(self) -> bool:
        """Whether new work is taken."""
        return self._opened is not None

    def open(self, core: Core, openai: ASGIApp | None = None, admin: TeacherAdmin | None = None) -> None:
        """Lets new work through to `core`, that of stock clients to `openai`, and changes to `admin`."""
        self._opened = Opened(core, openai, admin)

    def close(self, reason: str) -> None:
        """Refuses new work with NotReady and this sentence; what is in flight goes on."""
        self._opened = None
        self._reason = reason

    async def idle(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    @contextmanager
    def entered(self) -> Generator[Opened, None, None]:
        """What the gate leads to; the caller is in flight until it leaves.

        Raises:
            NotReady: the gate is closed.
        """
        if self._opened is None:
            raise NotReady(self._reason)
        self._num_in_flight += 1
        self._idle.clear()
        try:
            yield self._opened
        finally:
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self._idle.set()

    async def info(self) -> TeacherInfo:
        """See TeacherService."""
        with self.entered() as opened:
            return await opened.core.info()

    async def score_stream(
        self, request: ScoreRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> ScoreStream:
        """See Core."""
        with self.entered() as opened:
            async with aclosing(opened.core.score_stream(request, timeout_s=timeout_s, client=client)) as replies:
                async for reply in replies:
                    yield reply

    async def generate_stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> GenerateStream:
        """See Core."""
        with self.entered() as opened:
            async with aclosing(opened.core.generate_stream(request, timeout_s=timeout_s, client=client)) as replies:
                async for reply in replies:
                    yield reply

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """See TeacherAdmin."""
        with self.entered() as opened:
            return await opened.changed_by().update_weights(update, chunks, timeout_s=timeout_s)

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """See TeacherAdmin."""
        with self.entered() as opened:
            return await opened.changed_by().unload(teacher, timeout_s=timeout_s)
