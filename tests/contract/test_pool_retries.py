"""A pool over replicas that fail: what is sent again, where, and how often."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from protos.errors import (
    Conflict,
    ContextTooLong,
    Corrupted,
    EngineFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    TeacherError,
    Unauthenticated,
    UnknownTeacher,
)
from protos.records import ScoreRequest
from tests.doors import ITEMS, QUICK, Doors, answered, check, raises
from tests.harness import until


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


def test_a_trial_that_says_nothing_of_the_replica_lets_the_next_one_begin(alone: Any) -> None:
    answer = asyncio.Event()

    async def refuse() -> None:
        await answer.wait()
        raise InvalidRequest("not a question")

    async def body(doors: Doors) -> None:
        options = replace(QUICK, failures_to_open=1, cool_down_s=0.01, probe_interval_s=60)
        async with doors.pool(options, "grpc://a:1") as pool:
            await pool.info()
            await asyncio.sleep(0.1)  # for the first probe after the handshake
            doors["a"].script.extend([(0, raises(EngineFailed("out of order"))), (0, refuse)])
            with pytest.raises(EngineFailed):
                await pool.score(ITEMS)
            await asyncio.sleep(0.05)
            await pool.info()
            assert pool.stats().replicas[0].breaker == "half_open"
            trial = asyncio.create_task(pool.score(ITEMS))
            await until(lambda: len(doors["a"].asked) == 2)
            waiting = asyncio.create_task(pool.score(ITEMS))
            await asyncio.sleep(0.05)
            assert len(doors["a"].asked) == 2
            answer.set()
            with pytest.raises(InvalidRequest):
                await trial
            async with asyncio.timeout(10):
                check(await waiting)

    alone(body)
