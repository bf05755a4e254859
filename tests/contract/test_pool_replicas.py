"""Which replicas a pool has: those that leave, join, come back as another, or were never there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from protos.errors import DeadlineExceeded, InvalidRequest, NotReady, TeacherError, Unauthenticated
from tests.doors import ITEMS, QUICK, Doors, answered, check, raises
from tests.harness import until


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


def test_a_resolver_that_fails_in_its_own_way_is_asked_again(alone: Any) -> None:
    failures: list[Exception] = []

    async def look_up(host: str, port: int) -> Sequence[str]:
        if failures:
            raise failures.pop()
        return ["a"]

    async def body(doors: Doors) -> None:
        options = replace(QUICK, resolve_interval_s=0.05)
        async with doors.pool(options, "dns+grpc://teachers:8001", look_up=look_up) as pool:
            await pool.info()
            for error in (OSError("no such name"), UnicodeError("label too long"), OSError("no such name")):
                failures.append(error)
                await until(lambda: not failures)

    alone(body)
