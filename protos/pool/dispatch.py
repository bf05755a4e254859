"""One request's way through a pool: split into parts, each sent, sent again where that can help, answered once."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from random import Random
from typing import Generic, TypeVar

from protos.client import Teacher
from protos.errors import (
    Conflict,
    Corrupted,
    DeadlineExceeded,
    EngineFailed,
    NotReady,
    TeacherError,
    UnknownTeacher,
)
from protos.pool.members import Members
from protos.pool.options import PoolOptions
from protos.pool.replica import Replica
from protos.pool.retry import RetryBudget, full_jitter
from protos.records import GenerateRequest, GenerateResult, ScoreRequest, ScoreResult

_Request = TypeVar("_Request", ScoreRequest, GenerateRequest)
_Result = TypeVar("_Result", ScoreResult, GenerateResult)

Send = Callable[[Teacher, _Request, float | None], AsyncGenerator[tuple[int, _Result | TeacherError], None]]
"""Sends a request to one replica with a deadline in seconds from now."""

LAST_WORDS_S = 1.0
"""For streams that have sent every reply to end by themselves: one that is cut off takes its connection along."""

_ITEM = re.compile(r"^items\[(\d+)\]")


@dataclass
class Tally:
    """What a pool counts; see `protos.pool.stats.PoolStats`."""

    num_requests: int = 0
    num_parts: int = 0
    num_retries: int = 0
    num_hedges: int = 0
    num_denied: int = 0
    num_failed_items: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def add_error(self, error: TeacherError) -> None:
        """Counts what a part broke off with."""
        self.errors[error.name] = self.errors.get(error.name, 0) + 1


@dataclass
class _Part:
    """Some of the request's items.

    Attributes:
        missing: indices of those not yet answered.
        errors: the last retryable error of each that had one.
        tried: the replicas it was sent to.
    """

    missing: set[int]
    errors: dict[int, TeacherError] = field(default_factory=dict)
    tried: list[Replica] = field(default_factory=list)


class Dispatch(Generic[_Request, _Result]):
    """One request being answered by the replicas of a pool.

    Args:
        sizes: tokens of each item, as far as the client can tell.
        timeout_s: until the caller no longer wants the answer.
    """

    def __init__(
        self,
        request: _Request,
        send: Send[_Request, _Result],
        sizes: Sequence[int],
        members: Members,
        options: PoolOptions,
        budget: RetryBudget,
        tally: Tally,
        random: Random,
        timeout_s: float | None,
    ) -> None:
        self._request = request
        self._send_to = send
        self._sizes = sizes
        self._members = members
        self._options = options
        self._budget = budget
        self._tally = tally
        self._random = random
        self._deadline = None if timeout_s is None else _now() + timeout_s
        self._outcomes: asyncio.Queue[tuple[int, _Result | TeacherError] | Exception] = asyncio.Queue()

    async def outcomes(self) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
        """Each item's index and outcome, once, as they come; nothing is left running when it is closed.

        Raises:
            TeacherError: a replica refused its part, and so the request.
        """
        parts = split(self._sizes, self._members.num_usable, self._options.min_part_tokens)
        self._tally.num_requests += 1
        self._tally.num_parts += len(parts)
        tasks = [asyncio.create_task(self._answer(_Part(set(indices)))) for indices in parts]
        try:
            for _ in self._sizes:
                outcome = await self._outcomes.get()
                if isinstance(outcome, Exception):
                    raise outcome
                self._tally.num_failed_items += isinstance(outcome[1], TeacherError)
                yield outcome
            await asyncio.wait(tasks, timeout=LAST_WORDS_S)
        finally:
            await _cancel(tasks)

    async def _answer(self, part: _Part) -> None:
        """Puts an outcome for every item of the part, or the one error that refuses the request."""
        try:
            await self._answer_or_raise(part)
        except Exception as error:
            self._outcomes.put_nowait(error)

    async def _answer_or_raise(self, part: _Part) -> None:
        self._budget.deposit()
        num_failures = 0
        while True:
            try:
                replica = await self._members.acquire(part.tried, self._time_left())
            except (NotReady, DeadlineExceeded) as error:
                return self._give_up(part, error)
            await self._attempt(replica, part)
            if not part.missing:
                return None
            num_failures += 1
            if num_failures == self._options.max_attempts or not self._may_send_again():
                return self._give_up(part)
            wait_s = self._wait_s(part, num_failures)
            time_left = self._time_left()
            if time_left is not None and wait_s >= time_left:
                return self._give_up(part)
            self._tally.num_retries += 1
            await asyncio.sleep(wait_s)

    async def _attempt(self, replica: Replica, part: _Part) -> None:
        """Sends what is missing to `replica`, and a slow remainder to another too; ends when no answer is to come.

        Hedged requests are those of Dean and Barroso, "The Tail at Scale" (CACM 56(2), 2013): deferred, so that few are
        sent; the first answer wins and the other request is cancelled. The retry budget pays for them.
        """
        with ExitStack() as loads:
            loads.callback(self._members.changed)  # called last, when the loads are off
            tasks = [self._start(replica, part, loads)]
            try:
                if self._options.hedge_after_s is not None:
                    await asyncio.wait(tasks, timeout=self._options.hedge_after_s)
                    other = None if tasks[0].done() else self._members.choose(part.tried, strictly=True)
                    if other is not None and self._may_send_again():
                        self._tally.num_hedges += 1
                        tasks.append(self._start(other, part, loads))
                while part.missing and (pending := [task for task in tasks if not task.done()]):
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if part.missing:
                    for task in tasks:
                        task.result()
            finally:
                await _cancel(tasks)

    def _start(self, replica: Replica, part: _Part, loads: ExitStack) -> asyncio.Task[None]:
        """Counts what is missing as work of `replica` from now on, and sends it."""
        part.tried.append(replica)
        loads.enter_context(replica.loaded(sum(self._sizes[i] for i in part.missing)))
        return asyncio.create_task(self._send(replica, part))

    async def _send(self, replica: Replica, part: _Part) -> None:
        """Takes the replica's answers to what is missing; raises only an error that refuses the whole request."""
        indices = sorted(part.missing)
        request = replace(self._request, items=tuple(self._request.items[i] for i in indices))
        num_replies = 0
        try:
            async with (
                replica.watched() as heard,
                aclosing(self._send_to(replica.teacher, request, self._time_left())) as replies,
            ):
                async for place, outcome in replies:
                    heard()
                    num_replies += 1
                    self._take(part, indices, place, outcome)
                    if not part.missing and num_replies < len(indices):
                        break  # the rest was answered elsewhere
            if num_replies:
                replica.succeeded()
        except TeacherError as error:
            self._tally.add_error(error)
            is_replica_s_fault = isinstance(error, (NotReady, Corrupted, EngineFailed))
            if is_replica_s_fault:
                replica.failed(error)
            if not is_replica_s_fault and not error.row.retryable and not self._differs_elsewhere(error, part):
                raise _in_request(error, indices) from error
            self._take_failure(part, indices, error)

    def _differs_elsewhere(self, error: TeacherError, part: _Part) -> bool:
        """Whether a replica that has not been asked may have the weights or the name that this one has not (yet)."""
        is_its_own = isinstance(error, (Conflict, UnknownTeacher))
        return is_its_own and self._members.choose(part.tried, strictly=True) is not None

    def _take(self, part: _Part, indices: Sequence[int], place: int, outcome: _Result | TeacherError) -> None:
        """Passes one outcome on, unless its item has one already or may still get a better one."""
        index = indices[place]
        if index not in part.missing:
            return
        if isinstance(outcome, TeacherError):
            outcome = _in_request(outcome, indices)
            if _may_be_answered(outcome) or self._differs_elsewhere(outcome, part):
                part.errors[index] = outcome
                return
        part.missing.remove(index)
        self._outcomes.put_nowait((index, outcome))

    def _take_failure(self, part: _Part, indices: Sequence[int], error: TeacherError) -> None:
        for place in range(len(indices)):
            self._take(part, indices, place, error)

    def _give_up(self, part: _Part, error: TeacherError | None = None) -> None:
        """Answers what is missing with its own last error, which says more than `error`: that nobody is left to ask."""
        for index in sorted(part.missing):
            outcome = part.errors.get(index, error)
            assert outcome is not None
            self._outcomes.put_nowait((index, outcome))

    def _may_send_again(self) -> bool:
        allowed = self._budget.withdraw(time.monotonic())
        self._tally.num_denied += not allowed
        return allowed

    def _wait_s(self, part: _Part, num_failures: int) -> float:
        """Full jitter; where there is no other replica to turn to, at least as long as the last one asked for."""
        options = self._options
        wait_s = full_jitter(num_failures, options.backoff_s, options.max_backoff_s, self._random)
        if self._members.choose(part.tried, strictly=True) is not None:
            return wait_s
        asked_s = max(part.errors[index].retry_after_s or 0.0 for index in part.missing)
        return max(wait_s, min(asked_s, options.unavailable_after_s))

    def _time_left(self) -> float | None:
        return None if self._deadline is None else self._deadline - _now()


def split(sizes: Sequence[int], num_parts: int, min_tokens: int) -> list[list[int]]:
    """Indices of `sizes` in at most `num_parts` runs of about equal sums, none wanted below `min_tokens`.

    Runs, not a deal: the rollouts of one prompt stand together and share its prefix in a replica's cache.
    """
    total = sum(sizes)
    num_parts = max(1, min(num_parts, total // min_tokens))
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    before = 0
    for index, size in enumerate(sizes):
        middle = before + size / 2
        parts[min(int(middle * num_parts / total), num_parts - 1) if total else 0].append(index)
        before += size
    return [part for part in parts if part]


def _may_be_answered(error: TeacherError) -> bool:
    """Whether the same replica may answer a second time; the caller's deadline does not come back."""
    return error.row.retryable and not isinstance(error, DeadlineExceeded)


def _in_request(error: TeacherError, indices: Sequence[int]) -> TeacherError:
    """The error with its field's place in the part turned into the place in the request."""
    match = _ITEM.match(error.field)
    if match is None or int(match[1]) >= len(indices):
        return error
    field = f"items[{indices[int(match[1])]}]{error.field[match.end() :]}"
    return type(error)(error.message, field=field, retry_after_s=error.retry_after_s)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _now() -> float:
    return asyncio.get_running_loop().time()
