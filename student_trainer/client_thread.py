"""A teacher for a synchronous caller: its asynchronous client, and the one event loop that runs it, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

from protos.client import Teacher, connect
from protos.credentials import Tls
from protos.records import TeacherInfo
from student_trainer.named_teacher import named

T = TypeVar("T")

CLOSE_S = 5.0
"""For what is cancelled, and for a connection that is closed, to end."""


class ClientThread:
    """A connection to one teacher.

    Args:
        url: as `protos.client.connect` takes it.
        tls: the files of a grpcs or https teacher; None for the defaults of `connect`.
        name: which of the server's teachers; None is its first.

    Attributes:
        teacher: the client; its coroutines run through `wait` and `start`.
        info: what the teacher said of itself.

    Raises:
        TeacherError: the teacher could not be asked; nothing is left behind.
    """

    def __init__(self, url: str, tls: Tls | None = None, *, name: str | None = None) -> None:
        self._begun: WeakSet[Coroutine[Any, Any, Any]] = WeakSet()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()
        try:
            self.teacher, self.info = self.wait(_connected(url, tls, name))
        except BaseException:
            self._stop()
            raise

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; its exceptions are raised here."""
        return self.start(work).result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins `work` and returns at once."""
        self._begun.add(work)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Gives up what is under way, closes the connection and ends the thread; each within CLOSE_S."""
        try:
            self.wait(self._disconnected())
        finally:
            self._stop()

    async def _disconnected(self) -> None:
        """The caller's own work first, for it ends those parts of it that run beside it; then the connection's."""
        await _ended({task for task in _others() if task.get_coro() in self._begun})
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.teacher.aclose()

    def _stop(self) -> None:
        self.wait(_rest_ended())  # what is left says so when it is destroyed
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _connected(url: str, tls: Tls | None, name: str | None) -> tuple[Teacher, TeacherInfo]:
    """`connect` inside the loop that will use it, whose sockets belong to it; closed again where nobody answers."""
    teacher = connect(url, tls=tls)
    try:
        teacher = teacher if name is None else await named(teacher, name)
        return teacher, await teacher.info()
    except BaseException:
        await teacher.aclose()
        raise


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # pyright: ignore[reportReturnType]


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels them and waits for them, for CLOSE_S at most; nobody asks any more what came of them."""
    for task in tasks:
        task.cancel()
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=CLOSE_S)
        for task in done:
            _ = task.cancelled() or task.exception()


async def _rest_ended() -> None:
    await _ended(_others())
