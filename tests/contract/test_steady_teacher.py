"""A teacher that fails some of a trainer's requests: what is asked again, and who answers afterwards."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from protos.client import Teacher
from protos.errors import NotReady
from protos.records import ScoreItem, ScoreRequest, TeacherInfo, crc32_of
from protos.service import ScoreStream
from student_trainer.steady_teacher import SteadyTeacher, WeightsLost
from student_trainer.teacher_identity import TeacherMismatch
from tests.harness import LoopThread, Server, until
from tests.teacher_over import TeacherOver

PROMPT = np.arange(10, 20, dtype=np.int32)
UNDER_WAY = ScoreItem(PROMPT, np.array([1, 2], np.int32))
MISSED = ScoreItem(PROMPT, np.array([3, 4], np.int32))


class Replaced(TeacherOver):
    """A real teacher that still answers UNDER_WAY, refuses one other request, and calls itself another from then on.

    Attributes:
        door: UNDER_WAY waits for it.
        num_infos: how often it was asked who it is.
    """

    def __init__(self, inner: Teacher) -> None:
        super().__init__(inner)
        self.door = asyncio.Event()
        self.is_replaced = False
        self.num_infos = 0

    async def info(self) -> TeacherInfo:
        self.num_infos += 1
        info = await self._inner.info()
        return replace(info, model="another") if self.is_replaced else info

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        if request.items[0] is UNDER_WAY:
            await self.door.wait()
        elif not self.is_replaced:
            self.is_replaced = True
            raise NotReady("restarting")
        async with aclosing(super().score_stream(request, timeout_s=timeout_s)) as replies:
            async for reply in replies:
                yield reply


class CutOff(TeacherOver):
    """A real teacher whose every answer breaks off after its first reply.

    Attributes:
        asked: the items of each request.
    """

    def __init__(self, inner: Teacher) -> None:
        super().__init__(inner)
        self.asked: list[int] = []

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        self.asked.append(len(request.items))
        async with aclosing(super().score_stream(request, timeout_s=timeout_s)) as replies:
            yield await anext(replies)
            raise NotReady("broke off")


def test_what_was_answered_is_not_asked_for_again(
    run: LoopThread, transformers_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_trainer.steady_teacher.FIRST_PAUSE_S", 0.01)
    items = [ScoreItem(PROMPT, np.arange(1, 2 + i, dtype=np.int32)) for i in range(3)]

    async def scenario() -> None:
        async with transformers_server.connect("grpc") as real:
            teacher = CutOff(real)
            results = await SteadyTeacher(teacher, await real.info(), max_wait_s=5).score(items, timeout_s=30)
            assert [result.completion_crc32 for result in results] == [crc32_of(one.completion_ids) for one in items]
            assert teacher.asked == [3, 2, 1]

    run(scenario())


class Restarted(TeacherOver):
    """A real teacher that is away for as long as `is_away`, and whose weights are those that it starts with."""

    is_away = True

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        if self.is_away:
            raise NotReady("restarting")
        async with aclosing(super().score_stream(request, timeout_s=timeout_s)) as replies:
            async for reply in replies:
                yield reply


@pytest.mark.parametrize("end", ["weights lost", "given up"])
def test_a_wait_that_brings_no_answer_is_over_all_the_same(
    run: LoopThread, transformers_server: Server, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Whatever it ended with, the time until the next one was no waiting."""
    monkeypatch.setattr("student_trainer.steady_teacher.FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr("student_trainer.steady_teacher.IDENTITY_HOLDS_S", 0.0)

    async def scenario() -> list[float]:
        async with transformers_server.connect("grpc") as real:
            teacher = Restarted(real)
            steady = SteadyTeacher(teacher, await real.info(), max_wait_s=60)
            waited_s = []
            for _ in range(2):
                teacher.is_away = True
                asking = asyncio.create_task(steady.score([UNDER_WAY], timeout_s=30))
                await asyncio.sleep(0.1)
                if end == "weights lost":
                    steady.expect(3)
                    teacher.is_away = False
                    with pytest.raises(WeightsLost):
                        await asking
                    steady.expect(0)
                else:
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                waited_s.append(steady.take_waited_s())
                await asyncio.sleep(1.0)
            return waited_s

    for waited_s in run(scenario()):
        assert 0.05 < waited_s < 1.0


def test_a_teacher_that_one_of_several_requests_missed_is_asked_again_who_it_is(
    run: LoopThread, transformers_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was known a moment ago, and the other request is answered by the teacher of before."""
    monkeypatch.setattr("student_trainer.steady_teacher.IDENTITY_HOLDS_S", 3600.0)

    async def scenario() -> int:
        async with transformers_server.connect("grpc") as real:
            teacher = Replaced(real)
            steady = SteadyTeacher(teacher, await real.info(), max_wait_s=60)
            under_way = asyncio.create_task(steady.score([UNDER_WAY], timeout_s=30))
            missed = asyncio.create_task(steady.score([MISSED], timeout_s=30))
            await until(lambda: teacher.is_replaced)
            teacher.door.set()
            await under_way
            for later in (missed, steady.score([MISSED], timeout_s=30)):
                with pytest.raises(TeacherMismatch, match=r"model was .* and is 'another'"):
                    await later
            return teacher.num_infos

    assert run(scenario()) == 2
