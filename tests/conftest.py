"""Fixtures for every test: a tiny model, one event loop, and real servers over it."""

from __future__ import annotations

import os

# Before torch is imported: two threads a process on a small machine slow each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.client import Teacher
from teacher_server.engines.base import Engine
from tests.harness import ROOT, LoopThread, Server, core_over, start_server
from tests.tiny_model import build_tiny_qwen3


@pytest.fixture(scope="session")
def run() -> Iterator[LoopThread]:
    """Runs a coroutine in the session's event loop and returns its result."""
    loop = LoopThread()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Qwen3 of 256 context tokens."""
    return build_tiny_qwen3(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, kept where the demo keeps it; the first call downloads it."""
    from student_trainer.study.smollm2 import fetch_smollm2

    return fetch_smollm2(ROOT / "models")


@pytest.fixture(scope="session")
def transformers_engine(run: LoopThread, tiny_model: Path) -> Iterator[Engine]:
    """The reference engine over the tiny model."""
    from teacher_server.engines.transformers import TransformersEngine

    engine = TransformersEngine(str(tiny_model))
    yield engine
    run(engine.close())


@pytest.fixture(scope="session")
def vllm_engine(run: LoopThread, tiny_model: Path) -> Iterator[Engine]:
    """vLLM over the tiny model."""
    from teacher_server.engines.vllm import VllmEngine

    engine = run(VllmEngine.create(str(tiny_model), dtype="float32", kv_cache_gib=0.25))
    yield engine
    run(engine.close())


@pytest.fixture(scope="session")
def transformers_server(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> Iterator[Server]:
    """A server over the reference engine."""
    yield from _server(run, transformers_engine, tiny_model)


@pytest.fixture(scope="session")
def vllm_server(run: LoopThread, vllm_engine: Engine, tiny_model: Path) -> Iterator[Server]:
    """A server over vLLM."""
    yield from _server(run, vllm_engine, tiny_model)


@pytest.fixture(scope="session", params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest) -> Server:
    """A server over each engine in turn."""
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture(params=["http", "grpc"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return request.param


@pytest.fixture
def teacher(run: LoopThread, server: Server, scheme: str) -> Iterator[Teacher]:
    """A client of each server over each transport."""
    teacher = server.connect(scheme)
    yield teacher
    run(teacher.aclose())


def _server(run: LoopThread, engine: Engine, model: Path) -> Iterator[Server]:
    async def start() -> Server:
        return await start_server(core_over(engine, model))

    server = run(start())
    yield server
    run(server.stop())
