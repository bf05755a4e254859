"""vLLM's process killed, frozen, and outlived: under a real server process, seen through both transports, and alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import psutil
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.client import Teacher, connect
from protos.errors import DeadlineExceeded, EngineFailed, NotReady
from protos.records import GenerateItem, ScoreItem
from teacher_server.engines.base import EngineDeadError
from tests.engine_tasks import generate_task, score_task
from tests.harness import START_S, LoopThread, until
from tests.server_process import TINY_VLLM, ServerProcess
from tests.tiny_model import build_tiny_qwen3

pytestmark = pytest.mark.slow

ITEM = ScoreItem(np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32))
LONG = GenerateItem(np.array([1], np.int32), max_new_tokens=250, num_samples=16, ignore_eos=True)
NUM_LONG = 20
"""Over each transport: 2 * 20 * 16 samples of 250 tokens are many seconds of work."""

ANSWERED_S = 3.0
"""From the kill to the last answer; a hundredth of it is expected, the rest is for a busy machine."""

END_S = 20.0
"""From the kill to the process' end: its last words, both listeners, and Python's own clean-up."""


async def is_ready(process: ServerProcess) -> tuple[bool, bool]:
    """What /readyz and gRPC health say; a server that takes no connection is not ready."""
    try:
        async with httpx.AsyncClient(base_url=process.ready["http_url"]) as client:
            http = (await client.get("/readyz")).status_code == httpx.codes.OK
    except httpx.TransportError:
        http = False
    try:
        async with aio.insecure_channel(process.ready["grpc_url"].removeprefix("grpc://")) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]
            grpc = (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    except aio.AioRpcError:
        grpc = False
    return http, grpc


async def metric(process: ServerProcess, name: str) -> float:
    async with httpx.AsyncClient(base_url=process.ready["http_url"]) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    [value] = [float(line.split()[1]) for line in lines if line.startswith(f"{name} ")]
    return value


async def seconds_until_not_ready(process: ServerProcess) -> float:
    started = time.monotonic()
    while any(await is_ready(process)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return time.monotonic() - started


def assert_ended_with(process: ServerProcess, code: int, children: Sequence[psutil.Process]) -> None:
    assert process.process.wait(END_S) == code, process.log.read_text()
    assert "Exception ignored" not in process.log.read_text()
    gone, alive = psutil.wait_procs(children, timeout=END_S)
    assert not alive
    assert gone


def test_an_engine_killed_at_work(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    async def scenario(process: ServerProcess, http: Teacher, grpc: Teacher) -> None:
        asking = [asyncio.create_task(teacher.generate([LONG])) for teacher in (http, grpc) for _ in range(NUM_LONG)]
        while await metric(process, "teacher_engine_requests") < 2 * NUM_LONG * LONG.num_samples:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert await is_ready(process) == (True, True)

        process.engines()[0].kill()
        not_ready = asyncio.create_task(seconds_until_not_ready(process))
        async with asyncio.timeout(ANSWERED_S):
            answers = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(answer) for answer in answers} == {EngineFailed}
        assert "engine process has died" in str(answers[0])
        assert await not_ready < ANSWERED_S
        for teacher in (http, grpc):
            with pytest.raises(NotReady):
                await teacher.score([ITEM], timeout_s=END_S)

    with ServerProcess(tiny_model, tmp_path, *TINY_VLLM) as process:
        children = psutil.Process(process.process.pid).children(recursive=True)
        run(with_both(process, scenario))
        assert_ended_with(process, 1, children)


async def with_both(process: ServerProcess, scenario) -> None:
    async with connect(process.ready["http_url"]) as http, connect(process.ready["grpc_url"]) as grpc:
        await scenario(process, http, grpc)


def test_an_engine_frozen_then_killed_at_rest(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    async def scenario(process: ServerProcess, http: Teacher, grpc: Teacher) -> None:
        before = [await teacher.score([ITEM]) for teacher in (http, grpc)]
        engine = process.engines()[0]
        engine.suspend()
        for teacher in (http, grpc):
            for ask in (teacher.score([ITEM], timeout_s=0.5), teacher.generate([LONG], timeout_s=0.5)):
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    await ask
                assert 0.5 <= time.monotonic() - started < 0.5 + ANSWERED_S
        # Nobody waits for it, so nothing is held for it; and a frozen process cannot be told from a busy one.
        assert await metric(process, "teacher_tokens_in_flight") == 0
        assert await metric(process, "teacher_engine_requests") == 0
        assert await is_ready(process) == (True, True)
        engine.resume()
        for teacher, [expected] in zip((http, grpc), before, strict=True):
            [again] = await teacher.score([ITEM], timeout_s=END_S)
            np.testing.assert_allclose(again.sampled_logprobs, expected.sampled_logprobs, rtol=0, atol=1e-5)

        await asyncio.sleep(0.3)  # at rest: no request will notice
        engine.kill()
        assert await seconds_until_not_ready(process) < ANSWERED_S

    with ServerProcess(tiny_model, tmp_path, *TINY_VLLM) as process:
        children = psutil.Process(process.process.pid).children(recursive=True)
        run(with_both(process, scenario))
        assert_ended_with(process, 1, children)


def test_an_engine_killed_while_it_starts(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    with ServerProcess(tiny_model, tmp_path, *TINY_VLLM, wait=False) as process:
        run(until(process.engines, timeout_s=60))
        process.engines()[0].kill()
        assert process.process.wait(END_S) == 2
        last = process.log.read_text().splitlines()[-1]
        assert last.startswith(f"teacher-server: cannot load {tiny_model} with vllm: vLLM's engine process ended")


def test_no_engine_outlives_its_server(tiny_model: Path, tmp_path: Path) -> None:
    with ServerProcess(tiny_model, tmp_path, *TINY_VLLM) as process:
        [engine] = process.engines()
        os.kill(process.process.pid, signal.SIGKILL)
        process.process.wait()
        engine.wait(END_S)  # raises TimeoutExpired


def test_a_killed_vllm_is_dead(run: LoopThread, tmp_path: Path) -> None:
    """The engine's process is gone from one moment to the next: no call waits for it."""
    from teacher_server.engines.vllm import VllmEngine

    model = build_tiny_qwen3(tmp_path, max_context_tokens=640)

    async def kill_at_work() -> None:
        engine = await VllmEngine.create(str(model), dtype="float32", kv_cache_gib=0.25)
        calls = [
            asyncio.create_task(engine.generate(generate_task(score_task(i, 40, 1).context_ids, max_new_tokens=600)))
            for i in range(4)
        ]
        await engine.score(score_task(18, 10, 10))
        (process,) = cast("Any", engine)._llm.engine_core.resources.engine_manager.processes
        process.kill()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=30)
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * 4
        with pytest.raises(EngineDeadError):
            await engine.score(score_task(18, 10, 10))
        await engine.close()

    run(kill_at_work(), START_S)
