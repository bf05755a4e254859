"""A pool over real servers: work is spread over the replicas, and each item gets its own answer, once."""

from __future__ import annotations

import asyncio
import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.errors import DeadlineExceeded, InvalidRequest, NotReady
from protos.records import ScoreRequest
from teacher_server.engines.base import Engine
from tests.doors import ITEMS, QUICK, Doors, check, hang, raises
from tests.harness import HeldEngine, LoopThread, Server, core_over, serving, until


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


def test_a_refusal_names_the_place_in_the_whole_request(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool:
            bad = replace(ITEMS[0], temperature=-1.0)
            with pytest.raises(InvalidRequest) as caught:
                await pool.score([*ITEMS[:9], bad, *ITEMS[9:]])
            assert caught.value.field == "items[9].temperature"

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


def test_the_pool_s_limits_are_the_smallest(alone: Any) -> None:
    async def body(doors: Doors) -> None:
        async with doors.pool() as pool, doors.server.connect("grpc") as teacher:
            doors["b"].told = replace(await teacher.info(), max_items=5)
            assert (await pool.info()).max_items == 5
            with pytest.raises(InvalidRequest, match="has 12 items; send at most 5"):
                await pool.score(ITEMS)

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
