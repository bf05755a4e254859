"""A pool over real servers, each behind a door that can be made to fail: what is retried, where, how often, when."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import protos
from protos.client import Teacher
from protos.errors import (
    Conflict,
    ContextTooLong,
    Corrupted,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    TeacherError,
    Unauthenticated,
    UnknownTeacher,
)
from protos.pool import PoolOptions, TeacherPool
from protos.records import (
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    TeacherInfo,
    crc32_of,
)
from protos.service import ScoreStream
from teacher_server.engines.base import Engine
from tests.harness import HeldEngine, LoopThread, Server, core_over, serving, until
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


@pytest.fixture
def alone(run: LoopThread, transformers_server: Server) -> Callable[[Scenario], None]:
    """Runs a scenario, and fails where it leaves a client's task or an open door behind."""

    async def scenario(body: Scenario) -> None:
        doors = Doors(transformers_server, {})
        await body(doors)
        assert all(door.is_closed for door in doors.by_url.values())
        assert not client_tasks()

    return lambda body: run(scenario(body))


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


def test_one_request_uses_every_replica(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(url="grpc://a:1,grpc://b:2,grpc://c:3") as pool:
            check(await pool.score(ITEMS))
            # 12 items of equal size in three runs.
            assert sorted(doors[name].asked for name in "abc") == [[[1, 2, 3, 4]], [[5, 6, 7, 8]], [[9, 10, 11, 12]]]
            assert (pool.stats().num_requests, pool.stats().num_parts) == (1, 3)

    alone(body)


def test_results_are_those_of_one_teacher(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool, doors.server.connect("grpc") as teacher:
            for ours, theirs in zip(await pool.score(ITEMS), await teacher.score(ITEMS), strict=True):
                np.testing.assert_array_equal(ours.sampled_logprobs, theirs.sampled_logprobs)

    alone(body)


def test_the_least_loaded_replica_is_chosen(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, min_part_tokens=1000)) as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.script.append((0, hang))
            big = asyncio.create_task(pool.score(ITEMS))
            await until(lambda: doors["a"].asked or doors["b"].asked)
            busy, free = (doors["a"], doors["b"]) if doors["a"].asked else (doors["b"], doors["a"])
            free.script.clear()
            for item in ITEMS:
                check(await pool.score([item]), [item])
            assert (len(busy.asked), len(free.asked)) == (1, 12)
            big.cancel()
            await asyncio.gather(big, return_exceptions=True)

    alone(body)


@pytest.mark.parametrize("error", [NotReady("cut"), Corrupted("garbled"), Overloaded("full", retry_after_s=30.0)])
def test_what_is_missing_is_sent_elsewhere(alone: Any, error: TeacherError) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, min_part_tokens=1000)) as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.script.append((4, raises(error)))  # 4 of 12 answered, then broken
            first = asyncio.create_task(pool.score(ITEMS))
            await until(lambda: doors["a"].asked or doors["b"].asked)
            failing, other = (doors["a"], doors["b"]) if doors["a"].asked else (doors["b"], doors["a"])
            other.script.clear()
            check(await first)
            assert len(failing.asked) == len(other.asked) == 1
            assert len(other.asked[0]) == 8
            assert (pool.stats().num_retries, pool.stats().num_failed_items) == (1, 0)

    alone(body)


@pytest.mark.parametrize(
    "error", [EngineFailed("died"), InvalidRequest("wrong"), ContextTooLong("long"), Unauthenticated("who?")]
)
def test_what_a_retry_cannot_help_is_not_retried(alone: Any, error: TeacherError) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, min_part_tokens=1000)) as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.script.append((0, raises(error)))
            with pytest.raises(type(error)):
                await pool.score(ITEMS)
            assert len(doors["a"].asked) + len(doors["b"].asked) == 1
            assert pool.stats().num_retries == 0

    alone(body)


@pytest.mark.parametrize("error", [Conflict("older weights"), UnknownTeacher("not loaded here yet")])
def test_what_another_replica_may_have_is_asked_of_it_once(alone: Any, error: TeacherError) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, min_part_tokens=1000)) as pool:
            await pool.info()
            doors["a"].script.extend([(0, raises(error))] * 9)
            for _ in range(4):
                check(await pool.score(ITEMS))
            assert all(replica.breaker == "closed" for replica in pool.stats().replicas)

            doors["b"].script.extend([(0, raises(error))] * 9)
            num_asked = len(doors["a"].asked) + len(doors["b"].asked)
            with pytest.raises(type(error)):
                await pool.score(ITEMS)
            assert len(doors["a"].asked) + len(doors["b"].asked) == num_asked + 2

    alone(body)


def test_an_engine_s_failure_leaves_the_other_parts_their_answers(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            await pool.info()
            doors["a"].script.append((1, raises(EngineFailed("died"))))
            outcomes = dict([reply async for reply in pool.score_stream(ScoreRequest(ITEMS))])
            assert sorted(outcomes) == list(range(12))
            failed = [i for i, outcome in outcomes.items() if isinstance(outcome, TeacherError)]
            # Six of the twelve were a's, and one of those was answered.
            assert len(failed) == pool.stats().num_failed_items == 5
            assert {i + 1 for i in failed} < set(answered(doors["a"]))

    alone(body)


def test_a_refusal_names_the_place_in_the_whole_request(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            bad = replace(ITEMS[0], temperature=-1.0)
            with pytest.raises(InvalidRequest) as caught:
                await pool.score([*ITEMS[:9], bad, *ITEMS[9:]])
            assert caught.value.field == "items[9].temperature"

    alone(body)


def test_attempts_end(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, min_part_tokens=1000, max_attempts=3, failures_to_open=10)) as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.script.extend([(0, raises(Corrupted("garbled")))] * 3)
            with pytest.raises(Corrupted, match="garbled"):
                await pool.score(ITEMS)
            assert len(doors["a"].asked) + len(doors["b"].asked) == 3
            # The second attempt went to the replica that the first did not.
            assert min(len(doors["a"].asked), len(doors["b"].asked)) == 1
            assert pool.stats().num_retries == 2

    alone(body)


def test_the_budget_bounds_the_retries(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        options = replace(QUICK, min_part_tokens=1000, min_retries_per_s=0.0, retry_ratio=0.1, failures_to_open=1000)
        async with doors.pool(options) as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.script.extend([(0, raises(Corrupted("garbled")))] * 200)
            for _ in range(100):
                with pytest.raises(Corrupted):
                    await pool.score(ITEMS[:1])
            # 100 requests at 0.1 earn 10 retries, up to the rounding of a hundred sums of 0.1.
            assert 9 <= pool.stats().num_retries <= 10
            assert len(doors["a"].asked) + len(doors["b"].asked) == 100 + pool.stats().num_retries
            assert pool.stats().num_denied >= 90

    alone(body)


def test_an_overloaded_replica_that_is_alone_is_left_the_time_it_asks_for(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(url="grpc://a:1,grpc://b:2") as pool:
            await pool.info()
            doors["b"].info_script.extend([raises(NotReady("gone"))] * 100)
            await until(lambda: any(replica.refusal for replica in pool.stats().replicas))
            doors["a"].script.append((0, raises(Overloaded("full", retry_after_s=0.5))))
            started = asyncio.get_running_loop().time()
            check(await pool.score(ITEMS))
            assert 0.5 <= asyncio.get_running_loop().time() - started < 5.0
            assert len(doors["a"].asked) == 2

    alone(body)


def test_the_breaker_keeps_work_from_a_replica_that_keeps_failing(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        options = replace(QUICK, failures_to_open=2, cool_down_s=2.0)
        async with doors.pool(options) as pool:
            await pool.info()
            doors["a"].script.extend([(0, raises(Corrupted("garbled")))] * 2)
            for _ in range(2):
                check(await pool.score(ITEMS))
            assert {replica.url: replica.breaker for replica in pool.stats().replicas} == {
                "grpc://a:1": "open",
                "grpc://b:2": "closed",
            }
            num_asked = len(doors["a"].asked)
            check(await pool.score(ITEMS))
            assert len(doors["a"].asked) == num_asked == 2
            await until(lambda: pool.stats().replicas[0].breaker == "half_open")
            check(await pool.score(ITEMS))
            assert pool.stats().replicas[0].breaker == "closed"
            assert len(doors["a"].asked) == 3

    alone(body)


def test_a_frozen_replica_loses_its_work(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, probe_timeout_s=0.5)) as pool:
            await pool.info()
            doors["a"].script.append((2, hang))
            doors["a"].info_script.extend([hang] * 3)
            async with asyncio.timeout(10.0):
                check(await pool.score(ITEMS))
            [a, b] = pool.stats().replicas
            assert (a.num_stalls, b.num_stalls) == (1, 0)
            assert len(doors["b"].asked) == 2
            await until(lambda: not pool.stats().replicas[0].refusal)  # it thaws

    alone(body)


def test_a_busy_replica_that_answers_probes_is_waited_for(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, probe_timeout_s=0.5)) as pool:
            await pool.info()

            async def slow() -> None:
                await asyncio.sleep(1.5)

            doors["a"].script.append((0, slow))
            check(await pool.score(ITEMS))
            assert len(doors["a"].asked) == len(doors["b"].asked) == 1
            assert pool.stats().num_retries == 0

    alone(body)


def test_an_engine_that_hangs_behind_a_live_server_is_given_up(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, stall_after_s=0.5)) as pool:
            await pool.info()
            doors["a"].script.append((2, hang))
            check(await pool.score(ITEMS))
            assert pool.stats().replicas[0].num_stalls == 1

    alone(body)


def test_a_slow_remainder_is_hedged(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, hedge_after_s=1.0)) as pool:
            await pool.info()
            doors["a"].script.append((2, hang))
            check(await pool.score(ITEMS))
            # b's own six, and the four of a's six that were still missing.
            assert sorted(map(len, doors["b"].asked)) == [4, 6]
            assert doors["a"].num_closed_early == 1
            assert (pool.stats().num_hedges, pool.stats().num_retries) == (1, 0)

    alone(body)


def test_nothing_is_hedged_unless_asked_for(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            await pool.info()

            async def slow() -> None:
                await asyncio.sleep(1.2)

            doors["a"].script.append((2, slow))
            check(await pool.score(ITEMS))
            assert (pool.stats().num_hedges, len(doors["b"].asked)) == (0, 1)

    alone(body)


def test_a_hedge_s_answers_are_passed_on_once(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, hedge_after_s=0.1)) as pool:
            await pool.info()

            async def slow() -> None:
                await asyncio.sleep(0.3)

            # Both go on after their pause, so that the same items are answered twice.
            doors["a"].script.append((0, slow))
            doors["b"].script.extend([(6, slow), (1, slow)])
            replies = [index async for index, _ in pool.score_stream(ScoreRequest(ITEMS))]
            assert sorted(replies) == list(range(12))
            assert pool.stats().num_hedges >= 1

    alone(body)


def test_the_deadline_is_the_caller_s(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> None:
        held = HeldEngine(transformers_engine)
        async with serving(core_over(held, tiny_model)) as server, server.connect("pool") as pool:
            await pool.info()
            with pytest.raises(DeadlineExceeded):
                await pool.score(ITEMS, timeout_s=1.0)
            assert held.num_started == len(ITEMS)  # sent once: no time is left for more
            await until(lambda: held.num_active == 0)

    run(scenario())


def test_no_replica_left_is_waited_for_and_then_said(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool(replace(QUICK, unavailable_after_s=0.6)) as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.info_script.extend([raises(NotReady(f"{door.url} is gone"))] * 1000)
            await until(lambda: all(replica.refusal for replica in pool.stats().replicas))
            started = asyncio.get_running_loop().time()
            with pytest.raises(NotReady) as caught:
                await pool.score(ITEMS)
            assert 0.6 <= asyncio.get_running_loop().time() - started < 3.0
            for words in ("took work for 0.6 s", "grpc://a:1 is gone", "grpc://b:2 is gone"):
                assert words in caught.value.message
            with pytest.raises(DeadlineExceeded, match=r"took work for 0\.\d+ s"):
                await pool.score(ITEMS, timeout_s=0.3)
            doors["b"].info_script.clear()
            check(await pool.score(ITEMS))  # it is back while the work waits

    alone(body)


def test_replicas_of_two_teachers_are_refused(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool, doors.server.connect("grpc") as teacher:
            doors["b"].told = replace(await teacher.info(), model="another")
            for call in (pool.info(), pool.score(ITEMS)):
                with pytest.raises(InvalidRequest) as caught:
                    await call
                assert "grpc://a:1 and grpc://b:2 are not replicas of one teacher: model is" in caught.value.message
            assert not doors["a"].asked

    alone(body)


def test_a_replica_that_comes_back_as_another_teacher_gets_no_work(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            info = await pool.info()
            doors["b"].told = replace(info, model="another")
            await until(lambda: pool.stats().replicas[1].refusal)
            assert "not replicas of one teacher" in pool.stats().replicas[1].refusal
            check(await pool.score(ITEMS))
            assert not doors["b"].asked

    alone(body)


def test_a_replica_that_was_away_at_first_joins_later(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            doors["b"].info_script.extend([raises(NotReady("still loading"))] * 3)
            check(await pool.score(ITEMS))
            assert not doors["b"].asked
            await until(lambda: not pool.stats().replicas[1].refusal)
            check(await pool.score(ITEMS))
            assert answered(doors["b"])

    alone(body)


@pytest.mark.parametrize("error", [NotReady("away"), Unauthenticated("who?")])
def test_nobody_there_is_said_at_once(alone: Any, error: TeacherError) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            for door in doors.by_url.values():
                door.info_script.append(raises(error))
            with pytest.raises(type(error), match="no replica of grpc://a:1,grpc://b:2 answers"):
                await pool.score(ITEMS)
            check(await pool.score(ITEMS))  # and a later call asks again

    alone(body)


def test_the_pool_s_limits_are_the_smallest(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool, doors.server.connect("grpc") as teacher:
            doors["b"].told = replace(await teacher.info(), max_items=5)
            assert (await pool.info()).max_items == 5
            with pytest.raises(InvalidRequest, match="has 12 items; send at most 5"):
                await pool.score(ITEMS)

    alone(body)


def test_names_are_looked_up_again(alone: Any) -> None:
    addresses = ["a", "b"]

    async def look_up(host: str, port: int) -> Sequence[str]:
        assert (host, port) == ("teachers", 8001)
        if not addresses:
            raise OSError("no such name")
        return list(addresses)

    async def body(doors: Doors) -> None:
        options = replace(QUICK, resolve_interval_s=0.1)
        async with doors.pool(options, "dns+grpc://teachers:8001", look_up=look_up) as pool:
            check(await pool.score(ITEMS))
            assert set(doors.by_url) == {"grpc://a:8001", "grpc://b:8001"}

            # "a" leaves with work in flight, which is let finish; "c" joins.
            thawed = asyncio.Event()
            doors["a"].script.append((1, lambda: thawed.wait()))  # pyright: ignore[reportArgumentType]
            asking = asyncio.create_task(pool.score(ITEMS))
            await until(lambda: len(doors["a"].asked) == 2)
            addresses[:] = ["b", "c"]
            await until(
                lambda: [replica.url for replica in pool.stats().replicas] == ["grpc://b:8001", "grpc://c:8001"]
            )
            assert not doors["a"].is_closed
            thawed.set()
            check(await asking)
            await until(lambda: doors["a"].is_closed)
            await until(lambda: not any(replica.refusal for replica in pool.stats().replicas))
            check(await pool.score(ITEMS))
            assert len(doors["a"].asked) == 2
            assert len(doors["c"].asked) == 1

            addresses.clear()  # a name server that is away takes nobody out
            await asyncio.sleep(0.3)
            check(await pool.score(ITEMS))

    alone(body)


def test_a_caller_that_leaves_between_replies_frees_the_rest(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            await pool.info()
            for door in doors.by_url.values():
                door.script.append((1, hang))
            stream = pool.score_stream(ScoreRequest(ITEMS))
            await anext(stream)
            await stream.aclose()
            assert doors["a"].num_closed_early == doors["b"].num_closed_early == 1
            assert all(replica.tokens_in_flight == 0 for replica in pool.stats().replicas)

    alone(body)


def test_closing_fails_what_waits(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        pool = doors.pool()
        await pool.info()
        for door in doors.by_url.values():
            door.info_script.extend([raises(NotReady("gone"))] * 100)
        await until(lambda: all(replica.refusal for replica in pool.stats().replicas))
        waiting = asyncio.create_task(pool.score(ITEMS))
        await asyncio.sleep(0.05)
        await pool.aclose()
        with pytest.raises(NotReady, match="is closed"):
            await waiting
        with pytest.raises(NotReady, match="is closed"):
            await pool.info()

    alone(body)


def test_no_descriptor_is_left_open(run: LoopThread, transformers_server: Server) -> None:
    async def scenario() -> None:
        for _ in range(3):
            async with transformers_server.connect("pool") as pool:
                check(await pool.score(ITEMS))

    def num_descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    run(scenario())
    before = num_descriptors()
    run(scenario())
    run(until(lambda: num_descriptors() <= before))
