"""How a change of what is served is waited for: within the caller's deadline, but to its end once it has begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

from protos.errors import DeadlineExceeded

_Result = TypeVar("_Result")

_log = structlog.get_logger()


@asynccontextmanager
async def within(timeout_s: float | None) -> AsyncGenerator[None, None]:
    """Raises DeadlineExceeded in the block when that many seconds have passed; None never does."""
    timeout = asyncio.timeout(timeout_s)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineExceeded(
            f"the change was not done within {timeout_s:g} s; see GetInfo for what is served"
        ) from None


async def to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Awaits `work` even when the caller is cancelled meanwhile: half-loaded weights must not be left behind."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled() and (error := task.exception()):
            _log.error("change failed", error=str(error))
        raise cancelled
    return task.result()
