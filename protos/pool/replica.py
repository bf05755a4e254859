"""One replica of a pool: what it said of itself, what it is working on, and whether it can be given more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from protos.client import Teacher
from protos.errors import NotReady, TeacherError
from protos.pool.breaker import Breaker
from protos.pool.options import PoolOptions
from protos.pool.stats import ReplicaStats
from protos.records import TeacherInfo

_log = logging.getLogger("protos.pool")


class Replica:
    """A teacher with its health and its load.

    Attributes:
        refusal: why it is given no work; "" while it may be.
        tokens_in_flight: of the parts it is working on.
        wanted: set when it should be probed at once.
        idle: set while it works on nothing.
    """

    def __init__(self, teacher: Teacher, options: PoolOptions) -> None:
        self.teacher = teacher
        self.refusal = "it has not been asked yet"
        self.tokens_in_flight = 0
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.idle = asyncio.Event()
        self.idle.set()
        self._options = options
        self._breaker = Breaker(options.failures_to_open, options.cool_down_s)
        self._num_in_flight = self._num_sent = self._num_failures = self._num_stalls = 0
        self._heard_at = 0.0
        self._watchdogs: set[asyncio.Timeout] = set()

    @property
    def url(self) -> str:
        """Where it is."""
        return self.teacher.url

    @property
    def is_usable(self) -> bool:
        """Whether it may be given work now."""
        return not self.refusal and self._breaker.allows

    def admit(self) -> None:
        """It is there and is the right teacher."""
        if self.refusal and self._num_sent:
            _log.warning("%s is back", self.url)
        self.refusal = ""
        self._breaker.probed(_now())

    def refuse(self, reason: str) -> None:
        """It gets no work until it is admitted again."""
        if not self.refusal:
            _log.warning("%s gets no more work: %s", self.url, reason)
        self.refusal = reason

    async def ask_info(self) -> TeacherInfo:
        """What it says of itself; one that says nothing at all loses its work in flight.

        Raises:
            TeacherError: it does not answer, or answers with an error.
        """
        asked_at = _now()
        timeout_s = self._options.probe_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self.teacher.info()
        except TimeoutError:
            if self._heard_at < asked_at:
                self._abandon()
            raise NotReady(f"{self.url} said nothing for {timeout_s:g} s") from None

    @contextmanager
    def loaded(self, num_tokens: int) -> Generator[None, None, None]:
        """Counts a part of `num_tokens` as its work."""
        self._breaker.begin()
        self.tokens_in_flight += num_tokens
        self._num_in_flight += 1
        self._num_sent += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._breaker.end()
            self.tokens_in_flight -= num_tokens
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self.idle.set()

    @asynccontextmanager
    async def watched(self) -> AsyncGenerator[Callable[[], None], None]:
        """Around one stream of replies: call what it yields at each; NotReady when stream or replica is silent."""
        stall_after_s = self._options.stall_after_s
        try:
            async with asyncio.timeout(stall_after_s) as watchdog:
                self._watchdogs.add(watchdog)

                def heard() -> None:
                    self._heard_at = _now()
                    watchdog.reschedule(self._heard_at + stall_after_s)

                try:
                    yield heard
                finally:
                    self._watchdogs.discard(watchdog)
        except TimeoutError:
            self._num_stalls += 1
            raise NotReady(f"{self.url} fell silent in the middle of a request") from None

    def succeeded(self) -> None:
        """A part was answered."""
        self._breaker.succeeded()

    def failed(self, error: TeacherError) -> None:
        """A part failed through the replica's or the connection's fault; one that cannot be reached is asked first."""
        self._num_failures += 1
        self._breaker.failed(_now())
        if isinstance(error, NotReady):
            self.refuse(error.message)
            self.wanted.set()

    def stats(self) -> ReplicaStats:
        """What it has done and how it is."""
        return ReplicaStats(
            url=self.url,
            breaker=self._breaker.state,
            refusal=self.refusal,
            tokens_in_flight=self.tokens_in_flight,
            num_sent=self._num_sent,
            num_failures=self._num_failures,
            num_stalls=self._num_stalls,
        )

    def _abandon(self) -> None:
        while self._watchdogs:
            watchdog = self._watchdogs.pop()
            if not watchdog.expired():  # one that has expired is there until its stream is closed
                watchdog.reschedule(_now())


def _now() -> float:
    return asyncio.get_running_loop().time()
