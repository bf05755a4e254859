"""What is done to every replica of a pool: new weights, and adapters that are no longer served."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from protos.client import Teacher
from protos.errors import NotReady, TeacherError
from protos.pool.replica import Replica
from protos.records import ServedTeacher


async def on_all(replicas: Sequence[Replica], act: Callable[[Teacher], Awaitable[ServedTeacher]]) -> ServedTeacher:
    """Acts on every replica at once, and waits for all; what the first of them then serves.

    Raises:
        NotReady: a replica is away; nothing was done to any.
        TeacherError: a replica failed, named in the message; the others may have done it. Of several that failed, one
            whom a retry can help.
    """
    for replica in replicas:
        if replica.refusal:
            raise NotReady(f"{replica.url} would miss the change, so no replica was changed: {replica.refusal}")
    outcomes = await asyncio.gather(*(act(replica.teacher) for replica in replicas), return_exceptions=True)
    pairs = list(zip(replicas, outcomes, strict=True))
    # First what may pass: sent again, the change is refused by those that have it, until all have.
    for replica, outcome in sorted(pairs, key=lambda pair: not _may_pass(pair[1])):
        if isinstance(outcome, TeacherError):
            message = f"{replica.url}: {outcome.message}; other replicas may have changed"
            raise type(outcome)(message, field=outcome.field, retry_after_s=outcome.retry_after_s) from outcome
        if isinstance(outcome, BaseException):
            raise outcome
    [first, *_] = outcomes
    assert isinstance(first, ServedTeacher)
    return first


def _may_pass(outcome: ServedTeacher | BaseException) -> bool:
    return isinstance(outcome, TeacherError) and outcome.row.retryable


@asynccontextmanager
async def kept(chunks: AsyncIterable[bytes] | None) -> AsyncGenerator[Path | None, None]:
    """The chunks as a file that every replica's copy is read from, until the end; None where there are none."""
    if chunks is None:
        yield None
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
        await asyncio.to_thread(file.flush)
        yield Path(file.name)
