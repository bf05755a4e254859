"""Several calls as one: all their results, or the first error with nothing left running behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in the order of the calls, which go on side by side.

    Raises:
        Exception: the first that any call raises, once the others, which are cancelled then, have ended.
    """
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second time would break into what it does in the end
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)
