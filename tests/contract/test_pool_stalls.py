"""A pool over replicas that answer late or never: who is waited for, given up or hedged."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from protos.errors import NotReady
from protos.records import ScoreRequest
from tests.doors import ITEMS, QUICK, Doors, check, hang
from tests.harness import until


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


def test_a_frozen_replica_whose_stream_is_being_given_up_is_still_one_that_says_nothing(alone: Any) -> None:
    async def closes_slowly() -> None:
        try:
            await hang()
        finally:
            await asyncio.sleep(0.6)

    async def body(doors: Doors) -> None:
        options = replace(QUICK, stall_after_s=0.2, probe_timeout_s=0.2, probe_interval_s=60)
        async with doors.pool(options, "grpc://a:1") as pool:
            await pool.info()
            await asyncio.sleep(0.1)  # for the first probe after the handshake
            doors["a"].script.append((0, closes_slowly))
            asking = asyncio.create_task(pool.score(ITEMS))
            await asyncio.sleep(0.3)
            doors["a"].info_script.append(hang)
            with pytest.raises(NotReady, match="said nothing"):  # while the stream is closed
                await pool.info()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    alone(body)


def test_a_frozen_replica_holds_up_one_question_who_the_teacher_is(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        options = replace(QUICK, probe_timeout_s=1.0)
        async with doors.pool(options) as pool:
            await pool.info()
            doors["b"].info_script.extend([hang] * 100)
            await until(lambda: pool.stats().replicas[1].refusal)
            async with asyncio.timeout(options.probe_timeout_s / 2):
                assert (await pool.info()).max_items == 64
            doors["b"].info_script.clear()
            await until(lambda: not pool.stats().replicas[1].refusal)

    alone(body)
