"""One teacher for a whole run: waited for while it is gone, refused when it comes back as another."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from protos.client import Teacher
from protos.errors import EngineFailed, TeacherError
from protos.records import (
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    TeacherInfo,
)
from student_trainer import interrupt
from student_trainer.stopped import TeacherGone
from student_trainer.teacher_identity import TeacherIdentity, TeacherMismatch

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between two attempts, doubled each time: a restart takes seconds, and who comes back must not be flooded."""

POLL_S = 0.1
"""How often a pause looks for a signal that ends the run."""

SAY_EVERY_S = 30.0
"""Between two lines about one wait."""

IDENTITY_HOLDS_S = 1.0
"""No server is replaced by another in less, so it is not asked again who it is."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item", ScoreItem, GenerateItem)
Result = TypeVar("Result", ScoreResult, GenerateResult)


class WeightsLost(TeacherMismatch):
    """The same teacher no longer has the weights that the run sent it: it was started anew."""


class SteadyTeacher:
    """Scores and writes by `teacher`, which stays the caller's to close.

    Waited for: everything that a retry can help, and an engine that failed, whose server ends and is restarted.

    Args:
        info: what the teacher said of itself when the run began.
        max_wait_s: how long one call waits for a teacher that is gone.
    """

    def __init__(self, teacher: Teacher, info: TeacherInfo, max_wait_s: float) -> None:
        self._teacher = teacher
        self._identity = TeacherIdentity.of(info)
        self._sent_version: int | None = None
        self._max_wait_s = max_wait_s
        self._identified = time.monotonic()
        self._said = 0.0
        self._gone_since: float | None = None
        self._num_failing = 0  # calls under way that have failed: nobody waits any more when the last has ended
        self._waited_s = 0.0

    async def score(self, items: Sequence[ScoreItem], *, timeout_s: float) -> list[ScoreResult]:
        """One result for each item, in order.

        Raises:
            TeacherMismatch: another teacher, or other weights, than when the run began or last sent some.
            WeightsLost: likewise, where sending them again mends it.
            TeacherGone: it was waited for in vain.
            Interrupted: a signal came during the wait.
            TeacherError: any other failure.
        """
        return await self._answers(
            items, lambda missing: self._teacher.score_stream(ScoreRequest(missing), timeout_s=timeout_s)
        )

    async def generate(self, items: Sequence[GenerateItem], *, timeout_s: float) -> list[GenerateResult]:
        """As `score`."""
        return await self._answers(
            items, lambda missing: self._teacher.generate_stream(GenerateRequest(missing), timeout_s=timeout_s)
        )

    async def take_weights(self, send: Callable[[], Awaitable[int]]) -> int:
        """Has `send` give the teacher new weights, and expects the version that it returns from here on.

        Raises:
            TeacherMismatch, TeacherGone, Interrupted, TeacherError: as in `score`.
        """

        async def attempt() -> int:
            await self._found_the_same()
            return await send()

        version = await self._waited_for(attempt)
        self.expect(version)
        return version

    def expect(self, version: int) -> None:
        """The teacher was sent weights of that version, here or by another rank: answers must carry it."""
        self._sent_version = version
        self._identity = replace(self._identity, weights_version=version)
        self._identified = time.monotonic()

    async def _answers(
        self,
        items: Sequence[Item],
        ask: Callable[[tuple[Item, ...]], AsyncGenerator[tuple[int, Result | TeacherError], None]],
    ) -> list[Result]:
        """An attempt asks for what those before it left unanswered, so that a teacher which is slow gets there."""
        results: dict[int, Result] = {}

        async def attempt() -> None:
            await self._identify()
            missing = [i for i in range(len(items)) if i not in results]
            if not missing:  # the attempt before failed after its last reply
                return
            failure: TeacherError | None = None
            async with aclosing(ask(tuple(items[i] for i in missing))) as replies:
                async for place, outcome in replies:
                    if not isinstance(outcome, TeacherError):
                        results[missing[place]] = outcome
                    elif _may_pass(outcome):
                        failure = outcome
                    else:
                        raise outcome
            if failure is not None:
                raise failure

        await self._waited_for(attempt)
        for result in results.values():
            self._check_version(result.weights_version)
        return [results[i] for i in range(len(items))]

    async def _waited_for(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns, made again until the teacher answers."""
        failed_at: float | None = None
        is_back = False
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                try:
                    result = await attempt()
                except TeacherMismatch:
                    is_back = True
                    raise
                except TeacherError as error:
                    if not _may_pass(error):
                        raise
                    now = time.monotonic()
                    if failed_at is None:
                        failed_at = now
                        self._num_failing += 1
                    self._missed(error, now)
                    if now - failed_at >= self._max_wait_s:
                        raise self._gone(error, now - failed_at) from error
                    await _pause(min(max(pause_s, error.retry_after_s or 0.0), failed_at + self._max_wait_s - now))
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                else:
                    is_back = True
                    return result
        finally:
            if failed_at is not None:
                self._num_failing -= 1
                if not self._num_failing:
                    self._waited(is_back=is_back)

    def take_waited_s(self) -> float:
        """Seconds that the teacher was gone since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    async def _identify(self) -> None:
        if time.monotonic() - self._identified < IDENTITY_HOLDS_S:
            return
        self._check_version((await self._found_the_same()).weights_version)
        self._identified = time.monotonic()

    async def _found_the_same(self) -> TeacherIdentity:
        """Who answers now; all but the weights' version is as it was."""
        now = TeacherIdentity.of(await self._teacher.info())
        self._refuse(self._identity.changes(replace(now, weights_version=self._identity.weights_version)))
        return now

    def _check_version(self, version: int | None) -> None:
        expected = self._identity.weights_version
        if version == expected:
            return
        if self._sent_version is not None and version is not None and version < self._sent_version:
            raise WeightsLost(
                f"teacher {self._teacher.url} was sent weights of version {expected} and has version {version}: it was "
                "started anew"
            )
        self._refuse([f"weights_version was {expected} and is {version}"])

    def _refuse(self, changes: Sequence[str]) -> None:
        if changes:
            raise TeacherMismatch(
                f"teacher {self._teacher.url} has changed during the run: {'; '.join(changes)}; bring the one before "
                "back and run the same command to go on"
            )

    def _missed(self, error: TeacherError, now: float) -> None:
        self._identified = -math.inf  # of other requests under way the one before may still answer some
        if self._gone_since is None:
            self._gone_since = now
            self._said = 0.0
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            logger.warning(
                "teacher %s does not answer (%s: %s): waiting, %.0f s so far, at most %.0f s",
                self._teacher.url,
                error.name,
                error,
                now - self._gone_since,
                self._max_wait_s,
            )

    def _waited(self, *, is_back: bool) -> None:
        """The last of those that waited waits no more: it was answered, it was given up, or it gave up itself."""
        assert self._gone_since is not None
        waited_s = time.monotonic() - self._gone_since
        self._gone_since = None
        self._waited_s += waited_s
        if is_back:
            logger.warning("teacher %s is back after %.0f s", self._teacher.url, waited_s)

    def _gone(self, error: TeacherError, waited_s: float) -> TeacherGone:
        return TeacherGone(
            f"teacher {self._teacher.url} has not answered for {waited_s:.0f} s (teacher.max_wait_s is "
            f"{self._max_wait_s:g}; {error.name}: {error}); run the same command to go on when it is back"
        )


def _may_pass(error: TeacherError) -> bool:
    return error.row.retryable or isinstance(error, EngineFailed)


async def _pause(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        interrupt.raise_if_requested()
        await asyncio.sleep(min(left, POLL_S))
