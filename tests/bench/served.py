"""A server process over one vLLM engine that also runs the engine's bare prefill: the ceiling of every score."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import structlog

START_TIMEOUT_S = 300.0


@dataclass
class Served:
    """A teacher server in a process of its own, and what can be asked of it besides its service."""

    grpc_url: str
    http_url: str
    pid: int
    _pipe: Connection

    def prefill(self, prompts: Sequence[list[int]], in_flight: int) -> float:
        """Seconds to compute these prompts with no log-probs at all, through the same AsyncLLM."""
        self._pipe.send((list(prompts), in_flight))
        return self._pipe.recv()


@contextmanager
def served(model: Path, **engine_args: Any) -> Iterator[Served]:
    """Such a server over `model` in float32, ended at the end; `engine_args` are vLLM's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, model, engine_args))
    process.start()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError(f"the server over {model} did not start within {START_TIMEOUT_S:g} s")
        grpc_url, http_url = ours.recv()
        assert process.pid is not None
        yield Served(grpc_url, http_url, process.pid, ours)
    finally:
        ours.send(None)
        process.join()


def _run(pipe: Connection, model: Path, engine_args: dict[str, Any]) -> None:
    asyncio.run(_serve(pipe, model, engine_args))
    os._exit(0)  # vLLM's leftover threads must not keep the process


async def _serve(pipe: Connection, model: Path, engine_args: dict[str, Any]) -> None:
    from teacher_server.engines.vllm import VllmEngine
    from tests.harness import core_over, serving

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    engine = await VllmEngine.create(str(model), dtype="float32", engine_args=engine_args)
    core = core_over(engine, model, max_items=1024)
    async with serving(core) as server:
        pipe.send((server.url("grpc"), server.url("http")))
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            prompts, in_flight = asked
            places = asyncio.Semaphore(in_flight)

            async def one(prompt: list[int], places: asyncio.Semaphore = places) -> None:
                async with places:
                    await engine.prefill(prompt)

            started = time.perf_counter()
            await asyncio.gather(*map(one, prompts))
            pipe.send(time.perf_counter() - started)
    core.close()
    await engine.close()


def peak_bytes(pid: int) -> int:
    """The largest resident memory of a process and its children since `reset_peak` (Linux: VmHWM), summed."""
    return sum(_status_kib(process, "VmHWM") for process in _family(pid)) * 1024


def reset_peak(pid: int) -> int:
    """Forgets the peaks so far; returns what is resident now, in bytes (proc(5), clear_refs)."""
    for process in _family(pid):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return sum(_status_kib(process, "VmRSS") for process in _family(pid)) * 1024


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _status_kib(process: psutil.Process, key: str) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:"))
