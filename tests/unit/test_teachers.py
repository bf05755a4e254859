"""Who may use and change the teachers when: the lock and the versions, without an engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protos.errors import Conflict, UnknownTeacher
from protos.records import ServedTeacher
from teacher_server.engines.base import Adapter
from teacher_server.teachers import ReadWriteLock, Teachers


def test_readers_share_and_a_writer_is_alone() -> None:
    async def scenario() -> list[str]:
        lock, events = ReadWriteLock(), []

        async def read(name: str, done: asyncio.Event) -> None:
            async with lock.read():
                events.append(f"{name} in")
                await done.wait()
            events.append(f"{name} out")

        async def write() -> None:
            async with lock.write():
                events.append("writer in")
                await asyncio.sleep(0.01)
                events.append("writer out")

        first, second = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(read("a", first)), asyncio.create_task(read("b", first))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(write()))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(read("late", second)))  # behind the writer, although readers are in
        await asyncio.sleep(0.01)
        assert events == ["a in", "b in"]
        first.set()
        second.set()
        await asyncio.gather(*tasks)
        return events

    assert asyncio.run(scenario()) == [
        "a in", "b in", "a out", "b out", "writer in", "writer out", "late in", "late out",
    ]  # fmt: skip


def test_a_writer_that_gives_up_lets_the_readers_go_on() -> None:
    async def scenario() -> None:
        lock = ReadWriteLock()
        async with lock.read():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), lock.write():
                    raise AssertionError("a reader is in")
            async with asyncio.timeout(1), lock.read():
                pass
        async with asyncio.timeout(1), lock.write():
            pass

    asyncio.run(scenario())


def test_names_of_the_model_share_its_weights() -> None:
    async def scenario() -> None:
        teachers = Teachers(("base", "same"))
        async with teachers.changing_model():
            teachers.replaced_model(4)
        assert teachers.served == (ServedTeacher("base", "model", 4), ServedTeacher("same", "model", 4))
        with pytest.raises(Conflict, match="weights of version 4; version 4 is not above it"):
            teachers.check_version("same", 4)
        teachers.check_version("same", 5)

    asyncio.run(scenario())


def test_an_adapter_s_old_version_serves_those_that_began_on_it() -> None:
    async def scenario() -> None:
        teachers = Teachers(("base",))
        old, new = Adapter(1, Path("1")), Adapter(2, Path("2"))
        assert teachers.put_adapter("rlvr", 1, old) is None
        async with teachers.use("rlvr") as before:
            replaced = teachers.put_adapter("rlvr", 2, new)
            assert replaced is not None
            assert replaced is before
            assert not replaced.unused.is_set()
            async with teachers.use("rlvr") as after:
                assert (before.adapter, before.version, after.adapter, after.version) == (old, 1, new, 2)
        assert replaced.unused.is_set()
        teachers.remove_adapter("rlvr")
        with pytest.raises(UnknownTeacher, match="'rlvr' here; served: base"):
            async with teachers.use("rlvr"):
                pass
        with pytest.raises(Conflict, match="version 2 is not above it"):
            teachers.check_version("rlvr", 2)

    asyncio.run(scenario())


def test_waiting_for_a_teacher_that_goes_away_ends() -> None:
    async def scenario() -> None:
        teachers = Teachers(("base",))
        teachers.put_adapter("rlvr", 1, Adapter(1, Path("1")))
        waiting = asyncio.create_task(teachers.reach(["rlvr"], 2, 60.0, None))
        await asyncio.sleep(0)
        teachers.remove_adapter("rlvr")
        with pytest.raises(UnknownTeacher):
            await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())
