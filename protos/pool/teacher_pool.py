"""A `Teacher` over several replicas: least loaded first, retried where that can help, every item answered once.

    async with connect("grpc://a:8001,grpc://b:8001") as teacher: ...
    async with TeacherPool("dns+grpc://teachers:8001", connect, PoolOptions(hedge_after_s=20)) as teacher:
        ...
        log(teacher.stats())

A request is split into parts by tokens, each for the replica with the fewest tokens in flight. What a part leaves
unanswered is sent again, elsewhere where possible, when a retry can help its error (`errors.Row.retryable`), within the
caller's deadline and the retry budget. A replica that fails again and again is left alone for a while, one that cannot
be reached until it has answered a probe, and one that turns out to be another teacher for as long as it is.
Items of one request may be scored by different weights while replicas are updated: each result has its version.
Where `min_weights_version` or a teacher's name is refused by one replica, the others are asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from random import Random
from typing import TypeVar

from protos import verify
from protos.client import Teacher, read_chunks
from protos.errors import DeadlineExceeded, InvalidRequest, TeacherError
from protos.pool.dispatch import Dispatch, Send, Tally
from protos.pool.fan_out import kept, on_all
from protos.pool.members import Members
from protos.pool.options import PoolOptions
from protos.pool.resolve import Resolve, look_up
from protos.pool.retry import RetryBudget
from protos.pool.stats import PoolStats
from protos.records import (
    Chat,
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    PrivilegedIds,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    ServedTeacher,
    TeacherInfo,
    WeightsUpdate,
)
from protos.service import GenerateStream, ScoreStream

CHARS_PER_TOKEN = 4
"""Of text that only the server can tokenise; only the balance between replicas depends on it."""

_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)
_Result = TypeVar("_Result", ScoreResult, GenerateResult)


class TeacherPool(Teacher):
    """The replicas behind `url` as one teacher; see `Teacher`.

    Args:
        url: several URLs with commas between them, or names whose every address is a replica (`dns+grpc://host:port`).
        connect_one: the teacher at one URL.
        look_up: how names become addresses.

    Raises:
        InvalidRequest: a URL is malformed or named twice.
    """

    def __init__(
        self,
        url: str,
        connect_one: Callable[[str], Teacher],
        options: PoolOptions | None = None,
        *,
        look_up: Resolve = look_up,
    ) -> None:
        self._url = url
        self._options = options or PoolOptions()
        # Not seeded: clients that are started alike must not wait and choose alike.
        self._random = Random()
        self._members = Members(url, connect_one, self._options, self._random, look_up)
        self._budget = RetryBudget(self._options.retry_ratio, self._options.min_retries_per_s, time.monotonic())
        self._tally = Tally()

    @property
    def url(self) -> str:
        """What the pool was made from."""
        return self._url

    def stats(self) -> PoolStats:
        """What the pool has done, and how its replicas are now."""
        return PoolStats(**asdict(self._tally), replicas=tuple(replica.stats() for replica in self._members.replicas))

    async def info(self) -> TeacherInfo:
        """What all replicas that answer are: their smallest limits and what all of them can.

        Raises:
            InvalidRequest: two replicas are not the same teacher; the message names both and what differs.
            TeacherError: no replica answers.
        """
        return await self._members.handshake()

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        """See TeacherService; items scored before a part was refused have been passed on already."""
        sizes = [_num_context_tokens(item) + len(item.completion_ids) for item in request.items]
        async with aclosing(self._stream(request, _score, sizes, timeout_s)) as replies:
            async for reply in replies:
                yield reply

    async def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """As `score_stream`."""
        sizes = [
            _num_context_tokens(item) + len(item.prefix_ids) + item.num_samples * item.max_new_tokens
            for item in request.items
        ]
        async with aclosing(self._stream(request, _generate, sizes, timeout_s)) as replies:
            async for reply in replies:
                yield reply

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """See TeacherAdmin and `protos.pool.fan_out.on_all`; a path must lead to the same file on every replica.

        Raises:
            InvalidRequest: a transfer, which is between its sender and one server.
        """
        if update.transfer is not None:
            raise InvalidRequest(
                f"{self._url} is a pool, and a transfer is to one server; send bytes", field="transfer"
            )
        await self._members.agreed_info()
        async with kept(chunks) as path:
            return await on_all(
                self._members.replicas,
                lambda teacher: teacher.update_weights(update, path and read_chunks(path), timeout_s=timeout_s),
            )

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """See TeacherAdmin and `protos.pool.fan_out.on_all`."""
        await self._members.agreed_info()
        return await on_all(self._members.replicas, lambda replica: replica.unload(teacher, timeout_s=timeout_s))

    async def aclose(self) -> None:
        """Ends the probes and closes every connection; work in flight fails."""
        await self._members.aclose()

    async def _stream(
        self, request: _Request, send: Send[_Request, _Result], sizes: Sequence[int], timeout_s: float | None
    ) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                info = await self._members.agreed_info()
        except TimeoutError:
            raise DeadlineExceeded(f"{self._url} did not answer within {timeout_s:g} s") from None
        # What one replica would refuse is not split into parts that each would take.
        verify.check_num_items(len(request.items), info.max_items)
        dispatch = Dispatch(
            request,
            send,
            # A negative count is the server's to refuse.
            [max(0, size) for size in sizes],
            self._members,
            self._options,
            self._budget,
            self._tally,
            self._random,
            None if timeout_s is None else timeout_s - (loop.time() - started),
        )
        async with aclosing(verify.errors_held(dispatch.outcomes())) as replies:
            async for reply in replies:
                yield reply


def _score(teacher: Teacher, request: ScoreRequest, timeout_s: float | None) -> ScoreStream:
    return teacher.score_stream(request, timeout_s=timeout_s)


def _generate(teacher: Teacher, request: GenerateRequest, timeout_s: float | None) -> GenerateStream:
    return teacher.generate_stream(request, timeout_s=timeout_s)


def _num_context_tokens(item: ScoreItem | GenerateItem) -> int:
    """Tokens before the completion; text is estimated."""
    if isinstance(item.prompt, Chat):
        num_tokens = sum(len(message.content) for message in item.prompt.messages) // CHARS_PER_TOKEN
    else:
        num_tokens = len(item.prompt)
    if item.privileged is None:
        return num_tokens
    if isinstance(item.privileged, PrivilegedIds):
        return num_tokens + len(item.privileged.ids)
    return num_tokens + len(item.privileged.text) // CHARS_PER_TOKEN
