"""A pool's replicas as doors to one real server, each of which can be made to fail."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import protos
from protos.client import Teacher
from protos.errors import TeacherError
from protos.pool import PoolOptions, TeacherPool
from protos.records import ScoreItem, ScoreRequest, ScoreResult, TeacherInfo, crc32_of
from protos.service import ScoreStream
from tests.harness import Server
from tests.teacher_over import TeacherOver

ITEMS = tuple(ScoreItem(np.array([1, 2, i + 1], np.int32), np.array([i + 1, 7], np.int32)) for i in range(12))
"""Five tokens each, no two alike."""

QUICK = PoolOptions(min_part_tokens=1, backoff_s=0.01, max_backoff_s=0.02, probe_interval_s=0.1, probe_timeout_s=2.0)

Fault = Callable[[], Awaitable[None]]
Scenario = Callable[["Doors"], Coroutine[Any, Any, None]]


def raises(error: TeacherError) -> Fault:
    async def fault() -> None:
        raise error

    return fault


async def hang() -> None:
    await asyncio.Event().wait()


class Door(TeacherOver):
    """A Teacher in front of a real one, at a URL of its own.

    Attributes:
        script: for each coming call of score: how many replies to let through, then what happens.
        info_script: what happens before each coming answer to info.
        told: what it says of itself in place of the truth.
        asked: the completions' first ids, call by call.
        num_closed_early: calls whose caller went away before their end.
    """

    def __init__(self, url: str, inner: Teacher) -> None:
        super().__init__(inner)
        self._url = url
        self.script: deque[tuple[int, Fault]] = deque()
        self.info_script: deque[Fault] = deque()
        self.told: TeacherInfo | None = None
        self.asked: list[list[int]] = []
        self.num_closed_early = 0
        self.is_closed = False

    @property
    def url(self) -> str:
        return self._url

    async def info(self) -> TeacherInfo:
        if self.info_script:
            await self.info_script.popleft()()
        return self.told or await super().info()

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        self.asked.append([int(item.completion_ids[0]) for item in request.items])
        num_replies, fault = self.script.popleft() if self.script else (len(request.items), None)
        try:
            async with aclosing(super().score_stream(request, timeout_s=timeout_s)) as replies:
                for _ in range(num_replies):
                    yield await anext(replies)
                if fault is not None:
                    await fault()
                async for reply in replies:
                    yield reply
        except (asyncio.CancelledError, GeneratorExit):
            self.num_closed_early += 1
            raise

    async def aclose(self) -> None:
        self.is_closed = True
        await super().aclose()


@dataclass
class Doors:
    """The doors by their URLs; each leads to the same server, over gRPC and HTTP in turn."""

    server: Server
    by_url: dict[str, Door]

    def open(self, url: str) -> Door:
        scheme = ("grpc", "http")[len(self.by_url) % 2]
        self.by_url[url] = Door(url, self.server.connect(scheme))
        return self.by_url[url]

    def pool(self, options: PoolOptions = QUICK, url: str = "grpc://a:1,grpc://b:2", **more: Any) -> TeacherPool:
        return TeacherPool(url, self.open, options, **more)

    def __getitem__(self, name: str) -> Door:
        [door] = [door for url, door in self.by_url.items() if f"//{name}:" in url]
        return door


async def over_doors(server: Server, body: Scenario) -> None:
    """Runs the scenario, and fails where it leaves a client's task or an open door behind."""
    doors = Doors(server, {})
    await body(doors)
    assert all(door.is_closed for door in doors.by_url.values())
    assert not client_tasks()


def client_tasks() -> list[asyncio.Task[Any]]:
    """Those whose code is the contract's; the server's live in the same loop."""
    folder = str(Path(protos.__file__).parent)
    return [task for task in asyncio.all_tasks() if code_of(task).startswith(folder)]


def code_of(task: asyncio.Task[Any]) -> str:
    code = getattr(task.get_coro(), "cr_code", None)
    return code.co_filename if code is not None else ""


def check(results: Sequence[ScoreResult], items: Sequence[ScoreItem] = ITEMS) -> None:
    """Every item's own answer in its own place."""
    assert [result.completion_crc32 for result in results] == [crc32_of(item.completion_ids) for item in items]
    assert all(result.num_context_tokens == 3 for result in results)


def answered(door: Door) -> list[int]:
    return sorted(i for call in door.asked for i in call)
