"""One of several requests under way fails, and what comes back is another teacher."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from protos.client import Teacher
from protos.errors import NotReady
from protos.records import ScoreItem, ScoreRequest, TeacherInfo
from protos.service import ScoreStream
from student_trainer.steady_teacher import SteadyTeacher
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
