"""Three replicas, eight clients, and what can go wrong between them: each item is right and once, or an error."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random

import numpy as np
import pytest

from protos.client import connect
from protos.errors import TeacherError
from protos.pool import PoolOptions, ReplicaStats, TeacherPool
from protos.records import ScoreItem, ScoreRequest, ScoreResult
from tests.chaos_proxy import ChaosProxy, Faults
from tests.harness import LoopThread, Server, until
from tests.warm import start_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]

SEED = 2718
NUM_CLIENTS = 8
MIN_ITEMS = 200
"""Answered to each client at least."""

OVERALL_S = 270.0
START_S = 150.0
NOTICE_S = 30.0
ATOL = 1e-5

OPTIONS = PoolOptions(
    min_part_tokens=64,
    max_backoff_s=1.0,
    min_retries_per_s=20.0,
    cool_down_s=1.0,
    probe_interval_s=0.5,
    probe_timeout_s=3.0,
    stall_after_s=10.0,
)


@dataclass
class Process:
    """A teacher server on ports of its own that can be killed, frozen and started again."""

    model: Path
    folder: Path
    http_port: int
    grpc_port: int
    running: ForkServerProcess | None = None

    def start(self) -> None:
        self.ready_file.unlink(missing_ok=True)
        flags = ["--engine", "transformers", "--threads", "1", "--model", str(self.model)]
        flags += ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        flags += ["--ready-file", str(self.ready_file)]
        self.running = start_server(self.folder / "server.log", *flags)

    @property
    def ready_file(self) -> Path:
        return self.folder / "ready.json"

    def signal(self, number: signal.Signals) -> None:
        assert self.running is not None
        assert self.running.pid is not None
        os.kill(self.running.pid, number)

    def end(self) -> None:
        """Kills it, frozen or not, and waits."""
        if self.running is not None:
            self.running.kill()
            self.running.join()

    async def ready(self) -> None:
        await until(self.ready_file.exists, START_S)


@dataclass
class Client:
    """Asks for random items again and again, and checks every answer.

    Attributes:
        num_right: items answered as the reference says.
        failed: items that got an error, by its name.
    """

    pool: TeacherPool
    items: Sequence[ScoreItem]
    expected: Sequence[ScoreResult]
    random: Random
    num_right: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    async def ask_until(self, over: asyncio.Event) -> None:
        while not over.is_set() or self.num_right < MIN_ITEMS:
            picked = [self.random.randrange(len(self.items)) for _ in range(self.random.randint(1, 16))]
            await self.ask(picked)
            # The servers need the processors too: to score, and to start again.
            await asyncio.sleep(self.random.uniform(0.0, 0.3))

    async def ask(self, picked: Sequence[int]) -> None:
        request = ScoreRequest(tuple(self.items[i] for i in picked))
        missing = set(range(len(picked)))
        try:
            async for index, outcome in self.pool.score_stream(request, timeout_s=30.0):
                missing.remove(index)  # a KeyError here is an item answered twice
                if isinstance(outcome, TeacherError):
                    self.failed[outcome.name] += 1
                else:
                    self.check(outcome, self.expected[picked[index]])
        except TeacherError as error:
            self.failed[error.name] += len(missing)
        else:
            assert not missing

    def check(self, result: ScoreResult, expected: ScoreResult) -> None:
        np.testing.assert_array_equal(result.top_ids, expected.top_ids)
        np.testing.assert_allclose(result.sampled_logprobs, expected.sampled_logprobs, rtol=0, atol=ATOL)
        np.testing.assert_allclose(result.top_logprobs, expected.top_logprobs, rtol=0, atol=ATOL)
        self.num_right += 1


@asynccontextmanager
async def replicas(model: Path, folder: Path) -> AsyncGenerator[list[Process], None]:
    """Three, started together."""
    ports = free_ports(6)
    processes = []
    for i in range(3):
        (folder / str(i)).mkdir()
        processes.append(Process(model, folder / str(i), ports[2 * i], ports[2 * i + 1]))
    try:
        for process in processes:
            process.start()
        for process in processes:
            await process.ready()
        yield processes
    finally:
        for process in processes:
            process.end()


def free_ports(num_ports: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ports)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


async def havoc(pool: TeacherPool, processes: Sequence[Process], proxies: Sequence[ChaosProxy]) -> None:
    """One fault after the other; one replica at least is always whole. Replicas 1 and 2 are behind the proxies."""

    def stats(i: int) -> ReplicaStats:
        return pool.stats().replicas[i]

    async def works_again(i: int) -> None:
        num_sent = stats(i).num_sent
        await until(lambda: stats(i).num_sent > num_sent and stats(i).breaker == "closed", NOTICE_S)

    async def killed_and_restarted(i: int) -> None:
        processes[i].end()
        await until(lambda: stats(i).refusal, NOTICE_S)
        processes[i].start()
        await processes[i].ready()
        await works_again(i)

    async def frozen_and_thawed(i: int) -> None:
        num_stalls = stats(i).num_stalls
        await until(lambda: stats(i).tokens_in_flight > 0, NOTICE_S)
        processes[i].signal(signal.SIGSTOP)
        try:
            await until(lambda: stats(i).num_stalls > num_stalls, NOTICE_S)
        finally:
            processes[i].signal(signal.SIGCONT)
        await works_again(i)

    async def damaged(proxy: ChaosProxy, faults: Faults) -> None:
        """For 4 seconds, and until each of these faults has happened: a breaker may keep traffic away for a while."""
        before = proxy.num_done
        proxy.faults = faults
        await asyncio.sleep(4.0)
        chances = (faults.flip, faults.cut, faults.delay)
        await until(
            lambda: all(now > then for now, then, p in zip(proxy.num_done, before, chances, strict=True) if p),
            NOTICE_S,
        )
        proxy.faults = Faults()

    await asyncio.gather(killed_and_restarted(0), damaged(proxies[0], Faults(flip=0.1)))
    await asyncio.gather(frozen_and_thawed(1), damaged(proxies[1], Faults(flip=0.1)))
    await asyncio.gather(killed_and_restarted(2), damaged(proxies[0], Faults(flip=0.05, cut=0.05, delay=0.2)))
    await asyncio.gather(frozen_and_thawed(0), damaged(proxies[1], Faults(flip=0.05, cut=0.05, delay=0.2)))
    for i in range(3):
        await works_again(i)


def test_every_item_is_answered_once_and_right_or_fails(
    run: LoopThread, transformers_server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    random = Random(SEED)
    items = [
        ScoreItem(
            np.array([random.randrange(256) for _ in range(random.randint(1, 40))], np.int32),
            np.array([random.randrange(256) for _ in range(random.randint(1, 40))], np.int32),
            temperature=random.choice([0.7, 1.0]),
            top_k=8,
        )
        for _ in range(64)
    ]
    expected = reference(run, transformers_server, items)
    forkserver.ensure_running()  # its descriptors are not the pool's
    before = descriptors()
    clients = asyncio.run(scenario(items, expected, random, tiny_model, tmp_path))

    num_right = sum(client.num_right for client in clients)
    failed = sum((client.failed for client in clients), Counter[str]())
    print(f"{num_right} items right, failed: {dict(failed)}")  # noqa: T201
    assert min(client.num_right for client in clients) >= MIN_ITEMS
    assert sum(failed.values()) <= 0.02 * num_right, failed
    gc.collect()
    assert descriptors() <= before


async def scenario(
    items: Sequence[ScoreItem], expected: Sequence[ScoreResult], random: Random, model: Path, folder: Path
) -> list[Client]:
    async with asyncio.timeout(OVERALL_S), replicas(model, folder) as processes:
        proxies = [
            await ChaosProxy.start(processes[1].http_port, seed=1),
            await ChaosProxy.start(processes[2].grpc_port, seed=2),
        ]
        url = (
            f"grpc://127.0.0.1:{processes[0].grpc_port},"
            f"http://127.0.0.1:{proxies[0].port},grpc://127.0.0.1:{proxies[1].port}"
        )
        over = asyncio.Event()
        async with TeacherPool(url, connect, OPTIONS) as pool:
            await pool.info()
            clients = [Client(pool, items, expected, Random(random.random())) for _ in range(NUM_CLIENTS)]
            try:
                async with asyncio.TaskGroup() as group:
                    for client in clients:
                        group.create_task(client.ask_until(over))
                    await havoc(pool, processes, proxies)
                    over.set()
            finally:
                stats = pool.stats()
                print(stats)  # noqa: T201
        for proxy in proxies:
            await proxy.stop()

        assert stats.num_retries > 10
        assert stats.errors["Corrupted"] > 0
        assert stats.errors["NotReady"] > 0
        assert min(replica.num_stalls for replica in stats.replicas[:2]) >= 1
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert all(process.running is not None and process.running.exitcode is not None for process in processes)
    return clients


def reference(run: LoopThread, server: Server, items: Sequence[ScoreItem]) -> list[ScoreResult]:
    """What one server says that nothing happens to; over both transports, so that their own descriptors are open."""

    async def score(scheme: str) -> list[ScoreResult]:
        async with server.connect(scheme) as teacher:
            return await teacher.score(items)

    run(score("http"))
    return run(score("grpc"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
