"""A thousand clients that vanish at random moments leave nothing behind: no request, no token, no task, no memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from pathlib import Path

import grpc.aio
import httpx
import numpy as np
import psutil
import pytest

from protos import codec
from protos.records import GenerateItem, GenerateRequest, ScoreItem, ScoreRequest
from protos.wire import GENERATE, GRPC_SERVICE, PROTOBUF_TYPE, SCORE, Operation
from teacher_server.admission import Admission
from teacher_server.engines.base import Engine
from teacher_server.metrics import Metrics
from tests.cutting_relay import Cut, cutting_relay
from tests.harness import LoopThread, Server, core_over, serving, until

NUM_WARM_UP, NUM_CLIENTS, NUM_AT_ONCE = 200, 1000, 50
TIMEOUT_S = 30.0
"""Of a client that was not cut: none comes near it."""

MAX_GROWTH_BYTES = 16 * 2**20
"""16 KiB a client would be one leaked request with its task and connection."""

MAX_REQUEST_BYTES = 600
"""More than any request here with its headers, so a cut may fall anywhere in it, or behind it."""

MAX_SECONDS = 0.1
"""Some requests are done by then and some are not."""


def random_cut(rng: np.random.Generator) -> Cut:
    reset = bool(rng.integers(2))
    match rng.integers(3):
        case 0:
            return Cut(bytes_up=rng.integers(MAX_REQUEST_BYTES), reset=reset)
        case 1:
            return Cut(bytes_down=rng.integers(MAX_REQUEST_BYTES), reset=reset)
        case _:
            return Cut(seconds=rng.uniform(0, MAX_SECONDS), reset=reset)


def random_ids(rng: np.random.Generator, num_ids: int) -> np.ndarray:
    return rng.integers(0, 256, num_ids).astype(np.int32)


def random_request(rng: np.random.Generator) -> tuple[Operation, bytes]:
    """A request of about 30 ms of work."""
    if rng.integers(2):
        items = [ScoreItem(random_ids(rng, 10), random_ids(rng, 20), top_k=20) for _ in range(rng.integers(1, 4))]
        return SCORE, codec.encode_score_request(ScoreRequest(tuple(items)))
    item = GenerateItem(random_ids(rng, 5), max_new_tokens=int(rng.integers(1, 40)), ignore_eos=True)
    return GENERATE, codec.encode_generate_request(GenerateRequest((item,)))


async def ask_http(client: httpx.AsyncClient, rng: np.random.Generator) -> None:
    operation, body = random_request(rng)
    headers = {"content-type": PROTOBUF_TYPE, "accept": PROTOBUF_TYPE}
    with contextlib.suppress(httpx.TransportError):
        await client.post(operation.http_path, content=body, headers=headers)


async def ask_grpc(channel: grpc.aio.Channel, rng: np.random.Generator) -> None:
    operation, body = random_request(rng)
    call = channel.unary_stream(f"/{GRPC_SERVICE}/{operation.grpc_method}")(body, timeout=TIMEOUT_S)
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass


def open_http(port: int) -> httpx.AsyncClient:
    """A pool of connections: one that was cut is replaced by the next request."""
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S)


def open_grpc(port: int) -> grpc.aio.Channel:
    """One connection of its own: by default channels share them, and wait together where one was cut."""
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.use_local_subchannel_pool", 1),))


async def all_vanish(server: Server, seeds: range) -> None:
    """A third give their call up over a connection that lives on; the others' connections are cut."""
    rng = np.random.default_rng(seeds.start)
    at_once = asyncio.Semaphore(NUM_AT_ONCE)
    http_port, grpc_port = (int(server.url(scheme).rpartition(":")[2]) for scheme in ("http", "grpc"))

    async def vanish(seed: int) -> None:
        rng = np.random.default_rng(seed)
        async with at_once:
            if rng.integers(3) == 0:
                asking = asyncio.create_task(ask_http(whole_http, rng) if seed % 2 else ask_grpc(whole_grpc, rng))
                await asyncio.wait((asking,), timeout=rng.uniform(0, MAX_SECONDS))
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            elif seed % 2:
                await ask_http(cut_http, rng)
            else:
                async with open_grpc(grpc_relay) as channel:
                    await ask_grpc(channel, rng)

    async with (
        cutting_relay(http_port, lambda: random_cut(rng)) as http_relay,
        cutting_relay(grpc_port, lambda: random_cut(rng)) as grpc_relay,
        open_http(http_port) as whole_http,
        open_http(http_relay) as cut_http,
        open_grpc(grpc_port) as whole_grpc,
    ):
        await asyncio.gather(*(vanish(seed) for seed in seeds))


def cancelled(metrics: Metrics) -> float:
    """Requests that were at work when their client vanished."""
    lines = metrics.text().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith('teacher_requests_total{error="Cancelled"'))


@pytest.mark.slow
def test_a_thousand_vanished_clients_leave_nothing_behind(
    run: LoopThread, vllm_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        admission, metrics = Admission(2000, 2**20), Metrics()
        core = core_over(vllm_engine, tiny_model, admission=admission)
        process = psutil.Process()
        item = ScoreItem(np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32), top_k=3)
        async with serving(core, metrics) as server:

            async def settled() -> tuple[int, int, int]:
                """Tasks, open files and resident bytes once nothing is in flight; fails if something stays."""
                await until(lambda: vllm_engine.num_unfinished == 0)
                await until(lambda: admission.tokens_queued == admission.tokens_in_flight == 0)
                await asyncio.wait_for(server.gate.idle(), 10)
                await asyncio.sleep(0.5)  # closed sockets and finished tasks are swept by the loop
                gc.collect()
                return len(asyncio.all_tasks()), process.num_fds(), process.memory_info().rss

            [before] = await score(server, item)
            await all_vanish(server, range(NUM_WARM_UP))
            num_tasks, num_files, num_bytes = await settled()
            cancelled_before = cancelled(metrics)
            await all_vanish(server, range(NUM_WARM_UP, NUM_WARM_UP + NUM_CLIENTS))
            tasks_after, files_after, bytes_after = await settled()

            assert cancelled(metrics) - cancelled_before > NUM_CLIENTS / 10  # many did vanish from work
            assert tasks_after <= num_tasks
            assert files_after <= num_files
            assert bytes_after - num_bytes < MAX_GROWTH_BYTES
            # vLLM gives its cache up only when no request holds a block of it.
            assert await vllm_engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]
            for scheme in ("http", "grpc"):
                [after] = await score(server, item, scheme)
                np.testing.assert_allclose(after.top_logprobs, before.top_logprobs, rtol=0, atol=1e-5)
        core.close()

    run(scenario())


async def score(server: Server, item: ScoreItem, scheme: str = "http") -> list:
    async with server.connect(scheme) as teacher:
        return await teacher.score([item], timeout_s=TIMEOUT_S)
