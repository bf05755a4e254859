"""A trainer's connection is closed: what it still asked is given up, and no task is left that says it was pending."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protos.records import ScoreItem
from student_trainer import client_thread
from student_trainer.client_thread import ClientThread
from student_trainer.rollout.base import Rollout
from student_trainer.scoring import Scorer, Wanted
from student_trainer.stopped import TeacherGone
from student_trainer.tasks import Problem
from teacher_server.engines.base import Engine, ScoreRows, ScoreTask
from tests.harness import HeldEngine, LoopThread, Server, core_over, start_server, until

IDS = np.arange(1, 5, dtype=np.int32)
ITEM = ScoreItem(IDS, IDS)
FAILS = 7
"""An id at which the engine below fails."""


class FailsAtSome(HeldEngine):
    """Behind its closed door, but for what fails once two others wait there."""

    async def score(self, task: ScoreTask) -> ScoreRows:
        if FAILS in task.completion_ids:
            await until(lambda: self.num_active == 2)
            raise RuntimeError("out of order")
        return await super().score(task)


@pytest.fixture
def engine(transformers_engine: Engine) -> FailsAtSome:
    return FailsAtSome(transformers_engine)


@pytest.fixture
def held(run: LoopThread, engine: FailsAtSome, tiny_model: Path) -> Iterator[Server]:
    """A server that scores nothing, one item a request."""

    async def start() -> Server:
        return await start_server(core_over(engine, tiny_model, max_items=1))

    server = run(start())
    yield server
    run(server.stop())


def rollout(*completion_ids: int) -> Rollout:
    ids = np.array(completion_ids, np.int32)
    logprobs, top_ids = np.zeros(len(ids), np.float32), np.empty((len(ids), 0), np.int32)
    return Rollout(Problem("p", (), ""), IDS, ids, logprobs, top_ids, is_finished=True, text="")


@pytest.mark.parametrize("scheme", ["http", "grpc", "pool"])
def test_what_is_under_way_when_it_is_closed_is_given_up_in_silence(
    run: LoopThread, engine: FailsAtSome, held: Server, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = ClientThread(held.url(scheme))
    for _ in range(3):
        client.start(client.teacher.score([ITEM]))
    run(until(lambda: engine.num_active == 3))
    client.close()
    run(until(lambda: engine.num_active == 0))
    del client
    gc.collect()
    assert not [record.message for record in caplog.records if record.name == "asyncio"]


def test_closing_waits_for_a_bounded_time(held: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_thread, "CLOSE_S", 0.2)
    client = ClientThread(held.url("grpc"))
    ended = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await ended.wait()

    client.start(stubborn())
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 5


def test_one_request_that_fails_ends_those_beside_it(run: LoopThread, engine: FailsAtSome, held: Server) -> None:
    """They were for one answer, which nobody gets now."""
    with Scorer(held.url("grpc"), temperature=1.0, timeout_s=60) as scorer:
        scores = scorer.start([rollout(1, 2), rollout(3, 4), rollout(5, FAILS)], Wanted())
        with pytest.raises(TeacherGone, match="out of order"):
            scores.result(60)
        run(until(lambda: engine.num_active == 0))
