"""Deadlines, clients that vanish, a full queue, loading, draining and a dead engine: over both transports."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.client import Teacher, connect
from protos.errors import DeadlineExceeded, EngineFailed, InvalidRequest, NotReady, Overloaded, TeacherError
from protos.records import GenerateItem, ScoreItem, ScoreRequest, ScoreResult
from teacher_server.admission import Admission
from teacher_server.config import ServeConfig
from teacher_server.engines.base import (
    Continuations,
    Engine,
    EngineDeadError,
    EngineInfo,
    GenerateTask,
    ScoreRows,
    ScoreTask,
)
from teacher_server.metrics import Metrics
from teacher_server.serve import serve_core
from tests.harness import HeldEngine, LoopThread, Server, core_over, serving, until

ITEM = ScoreItem(np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32))
"""5 tokens."""


def freed(held: HeldEngine, admission: Admission) -> bool:
    return held.num_active == admission.tokens_in_flight == admission.tokens_queued == 0


@pytest.mark.parametrize("operation", ["score", "generate"])
def test_a_passed_deadline_frees_the_work(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path, operation: str
) -> None:
    async def scenario() -> None:
        held, admission = HeldEngine(transformers_engine), Admission(1000, 1000)
        core = core_over(held, tiny_model, admission=admission)
        async with serving(core) as server, server.connect(scheme) as teacher:
            await teacher.info()  # connected: the deadline is spent at the engine's door
            with pytest.raises(DeadlineExceeded):
                await ask(teacher, operation, timeout_s=1.0)
            assert held.num_started == 1
            await until(lambda: freed(held, admission))

    run(scenario())


async def ask(teacher: Teacher, operation: str, timeout_s: float | None = None) -> object:
    if operation == "score":
        return await teacher.score([ITEM], timeout_s=timeout_s)
    return await teacher.generate([GenerateItem(ITEM.prompt, max_new_tokens=2)], timeout_s=timeout_s)


def test_the_server_itself_keeps_the_deadline(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> None:
        held, admission = HeldEngine(transformers_engine), Admission(1000, 1000)
        core = core_over(held, tiny_model, admission=admission)
        async with serving(core) as server, httpx.AsyncClient(base_url=server.listeners.http_url) as client:
            body = {"items": [{"prompt_ids": [1], "completion_ids": [2]}]}
            answer = await client.post("/v1/score", json=body, headers={"x-timeout-s": "0.2"})
            assert (answer.status_code, answer.json()["error"]["name"]) == (504, "DeadlineExceeded")
            assert freed(held, admission)

    run(scenario())


def test_work_done_before_the_deadline_is_kept(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> list[object]:
        # 5 tokens in flight at most: the second item waits behind the first, which an empty door never lets finish.
        held, admission = HeldEngine(transformers_engine), Admission(5, 1000)
        core = core_over(held, tiny_model, admission=admission)
        empty = ScoreItem(ITEM.prompt, np.empty(0, np.int32))
        replies = [reply async for reply in core.score_stream(request(empty, ITEM), timeout_s=0.3)]
        core.close()
        assert freed(held, admission)
        return [(index, type(outcome)) for index, outcome in replies]

    assert run(scenario()) == [(0, ScoreResult), (1, DeadlineExceeded)]


def request(*items: ScoreItem) -> ScoreRequest:
    return ScoreRequest(items)


@pytest.mark.parametrize("operation", ["score", "generate"])
def test_a_client_that_vanishes_frees_its_work(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path, operation: str
) -> None:
    async def scenario() -> None:
        held, admission = HeldEngine(transformers_engine), Admission(1000, 1000)
        core = core_over(held, tiny_model, admission=admission)
        async with serving(core) as server, server.connect(scheme) as teacher:
            asking = asyncio.create_task(ask(teacher, operation))
            await until(lambda: held.num_active == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await until(lambda: freed(held, admission))
            await asyncio.wait_for(server.gate.idle(), 5)

    run(scenario())


def test_a_client_that_vanishes_between_replies_frees_the_rest(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        held, admission = HeldEngine(transformers_engine), Admission(1000, 1000)
        core = core_over(held, tiny_model, admission=admission)
        empty = ScoreItem(ITEM.prompt, np.empty(0, np.int32))
        async with serving(core) as server, server.connect(scheme) as teacher:
            stream = teacher.score_stream(request(empty, ITEM))
            index, _ = await anext(stream)  # sent at once: the other item is still at work
            assert index == 0
            assert held.num_active == 1
            await stream.aclose()
            await until(lambda: freed(held, admission))

    run(scenario())


def test_a_full_queue_is_overloaded(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        # 5 tokens at work, 5 waiting, and no room for 5 more.
        held, admission = HeldEngine(transformers_engine), Admission(5, 9)
        core = core_over(held, tiny_model, admission=admission)
        async with serving(core) as server, server.connect(scheme) as teacher:
            asking = [asyncio.create_task(teacher.score([ITEM]))]
            await until(lambda: held.num_active == 1)
            asking.append(asyncio.create_task(teacher.score([ITEM])))
            await until(lambda: admission.tokens_queued == 5)
            with pytest.raises(Overloaded) as caught:
                await teacher.score([ITEM])
            assert caught.value.retry_after_s == 1.0
            held.door.set()
            first, second = await asyncio.gather(*asking)
            assert second[0].queue_s > first[0].queue_s
            np.testing.assert_array_equal(first[0].sampled_logprobs, second[0].sampled_logprobs)
            assert freed(held, admission)

    run(scenario())


def test_one_failure_leaves_the_other_items_their_answers(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        core = core_over(Faulty(transformers_engine, ValueError("not this one")), tiny_model)
        good, bad = ITEM, ScoreItem(ITEM.prompt, np.array([7], np.int32))
        async with serving(core) as server, server.connect(scheme) as teacher:
            outcomes = dict([reply async for reply in teacher.score_stream(request(bad, good))])
            assert isinstance(outcomes[1], ScoreResult)
            assert isinstance(outcomes[0], TeacherError)
            assert (outcomes[0].name, outcomes[0].field) == ("InvalidRequest", "items[0]")
            # Alone, the same item fails the request as a whole.
            with pytest.raises(TeacherError, match="not this one"):
                await anext(teacher.score_stream(request(bad)))

    run(scenario())


class Faulty:
    """A real engine that raises `error` on completions of one token."""

    def __init__(self, inner: Engine, error: Exception) -> None:
        self._inner = inner
        self._error = error

    @property
    def info(self) -> EngineInfo:
        return self._inner.info

    @property
    def num_unfinished(self) -> int:
        return self._inner.num_unfinished

    async def score(self, task: ScoreTask) -> ScoreRows:
        if len(task.completion_ids) == 1:
            raise self._error
        return await self._inner.score(task)

    async def generate(self, task: GenerateTask) -> Continuations:
        raise self._error

    async def died(self) -> None:
        await self._inner.died()

    async def close(self) -> None:
        """The inner engine is its owner's."""


def test_a_dead_engine_fails_what_is_in_flight_and_says_so(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        core = core_over(Faulty(transformers_engine, EngineDeadError("killed")), tiny_model)
        async with serving(core) as server, server.connect(scheme) as teacher:
            with pytest.raises(EngineFailed, match="killed"):
                await teacher.score([ScoreItem(ITEM.prompt, np.array([7], np.int32))])
            assert core.dead.is_set()

    run(scenario())


def test_the_engine_s_death_ends_the_process_with_1(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        core = core_over(Faulty(transformers_engine, EngineDeadError("killed")), tiny_model)
        async with serving(None) as server, server.connect(scheme) as teacher:
            config = ServeConfig(model=str(tiny_model))
            serving_it = asyncio.create_task(serve_core(core, server.gate, server.listeners, asyncio.Event(), config))
            await until(lambda: server.gate.is_open)
            with pytest.raises(EngineFailed, match="killed"):
                await teacher.score([ScoreItem(ITEM.prompt, np.array([7], np.int32))])
            assert await asyncio.wait_for(serving_it, 5) == 1
            with pytest.raises(NotReady, match="died"):
                await teacher.score([ITEM])

    run(scenario())


@pytest.mark.parametrize("drain_timeout_s", [0.2, 30.0])
def test_a_drain_waits_no_longer_than_told(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, drain_timeout_s: float
) -> None:
    async def scenario() -> bool:
        held, stop = HeldEngine(transformers_engine), asyncio.Event()
        core = core_over(held, tiny_model)
        async with serving(None) as server, server.connect("grpc") as teacher:
            config = ServeConfig(model=str(tiny_model), drain_timeout_s=drain_timeout_s)
            serving_it = asyncio.create_task(serve_core(core, server.gate, server.listeners, stop, config))
            await until(lambda: server.gate.is_open)
            asking = asyncio.create_task(teacher.score([ITEM]))
            await until(lambda: held.num_active == 1)
            stop.set()
            await asyncio.wait((serving_it,), timeout=1.0)
            gave_up = serving_it.done()
            held.door.set()
            await asking
            assert await serving_it == 0
            return gave_up

    assert run(scenario()) == (drain_timeout_s < 1.0)


async def readiness(server: Server) -> tuple[int, int, dict[str, int]]:
    """The statuses of /healthz and /readyz, and gRPC health by service name."""
    async with httpx.AsyncClient(base_url=server.listeners.http_url) as client:
        alive = (await client.get("/healthz")).status_code
        ready = (await client.get("/readyz")).status_code
    async with aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://")) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]
        names = ("", "teacher.v1.TeacherService")
        health = {name: (await check(health_pb2.HealthCheckRequest(service=name))).status for name in names}
    return alive, ready, health


def health(status: int) -> dict[str, int]:
    return {"": status, "teacher.v1.TeacherService": status}


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_loading_ready_draining(run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> None:
        held = HeldEngine(transformers_engine)
        async with serving(None) as server, server.connect(scheme) as teacher:
            assert await readiness(server) == (200, 503, health(NOT_SERVING))
            with pytest.raises(NotReady, match="loading"):
                await teacher.info()
            with pytest.raises(NotReady, match="loading"):
                await teacher.score([ITEM])

            server.gate.open(core_over(held, tiny_model))
            await server.listeners.set_ready(True)
            assert await readiness(server) == (200, 200, health(SERVING))
            asking = asyncio.create_task(teacher.score([ITEM]))
            await until(lambda: held.num_active == 1)

            server.gate.close("the server is draining")
            await server.listeners.set_ready(False)
            assert await readiness(server) == (200, 503, health(NOT_SERVING))
            with pytest.raises(NotReady, match="draining"):
                await teacher.score([ITEM])
            idle = asyncio.create_task(server.gate.idle())
            await asyncio.sleep(0.05)
            assert not idle.done()
            held.door.set()
            assert (await asking)[0].num_tokens == 2
            await asyncio.wait_for(idle, 5)

    run(scenario())


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "grpc://127.0.0.1:1", "http://no.such.host.invalid:80"])
def test_an_unreachable_server_is_not_ready_and_named(run: LoopThread, url: str) -> None:
    async def scenario() -> None:
        async with connect(url) as teacher:
            with pytest.raises(NotReady) as caught:
                await teacher.info()
            assert url in caught.value.message

    run(scenario())


def test_a_server_that_stops_mid_stream_is_not_ready(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        held = HeldEngine(transformers_engine)
        empty = ScoreItem(ITEM.prompt, np.empty(0, np.int32))
        async with serving(core_over(held, tiny_model)) as server, server.connect(scheme) as teacher:
            stream = teacher.score_stream(request(empty, ITEM))
            await anext(stream)
            stopping = asyncio.create_task(server.listeners.stop(0.0))
            with pytest.raises(NotReady):
                await anext(stream)
            await stopping

    run(scenario())


def test_what_happened_is_counted(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> str:
        metrics = Metrics()
        core = core_over(transformers_engine, tiny_model)
        async with serving(core, metrics) as server, server.connect("grpc") as teacher:
            await teacher.score([ITEM, ITEM])
            with pytest.raises(InvalidRequest):
                await teacher.score([])
            async with httpx.AsyncClient(base_url=server.listeners.http_url) as client:
                return (await client.get("/metrics")).text

    lines = run(scenario()).splitlines()
    assert "teacher_ready 1.0" in lines
    assert 'teacher_items_total{operation="score"} 2.0' in lines
    assert 'teacher_requests_total{error="",operation="score"} 1.0' in lines
    assert 'teacher_requests_total{error="InvalidRequest",operation="score"} 1.0' in lines
    assert 'teacher_tokens_total{kind="context",operation="score"} 6.0' in lines  # 2 items of 3 tokens
    assert 'teacher_tokens_total{kind="new",operation="score"} 4.0' in lines  # 2 items of 2 tokens
