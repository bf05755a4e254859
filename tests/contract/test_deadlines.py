"""Deadlines inside vLLM: what runs out of time gives its tokens and its KV cache back at once, and disturbs nobody."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from protos.client import Teacher
from protos.errors import DeadlineExceeded
from protos.records import GenerateItem, ScoreItem
from teacher_server.admission import Admission
from teacher_server.engines.base import Engine
from tests.harness import LoopThread, core_over, serving, until

pytestmark = pytest.mark.slow

ONE = np.array([1], np.int32)
LONG = GenerateItem(ONE, max_new_tokens=250, ignore_eos=True, num_samples=64)
"""Four of these are 256 samples of 250 tokens: several seconds of work."""

NEIGHBOUR = GenerateItem(ONE, max_new_tokens=250, ignore_eos=True, temperature=0.0)
NEIGHBOUR_TOKENS = 1 + 250
DEADLINE_S = 0.05
FREED_S = 1.5
"""From the deadline to the last block of cache: one step of the engine is expected, the rest is for a busy machine."""


def score_items() -> list[ScoreItem]:
    rng = np.random.default_rng(0)
    return [ScoreItem(ONE, rng.integers(0, 256, 250).astype(np.int32), top_k=64) for _ in range(60)]


async def ask(teacher: Teacher, operation: str) -> object:
    if operation == "score":
        return await teacher.score(score_items(), timeout_s=DEADLINE_S)
    return await teacher.generate([LONG] * 4, timeout_s=DEADLINE_S)


async def cache_is_free(engine: Engine) -> bool:
    """vLLM gives its prefix cache up only when no request holds a block."""
    return await engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("operation", ["score", "generate"])
def test_a_passed_deadline_frees_the_engine(
    run: LoopThread, scheme: str, vllm_engine: Engine, tiny_model: Path, operation: str
) -> None:
    async def scenario() -> None:
        admission = Admission(2**20, 2**20)
        core = core_over(vllm_engine, tiny_model, admission=admission)
        async with serving(core) as server, server.connect(scheme) as teacher:
            await teacher.info()
            with pytest.raises(DeadlineExceeded):
                await ask(teacher, operation)
            started = time.monotonic()
            await until(lambda: admission.tokens_in_flight == admission.tokens_queued == 0, FREED_S)
            await until(lambda: vllm_engine.num_unfinished == 0, FREED_S)
            while not await cache_is_free(vllm_engine):
                assert time.monotonic() - started < FREED_S
            await asyncio.wait_for(server.gate.idle(), FREED_S)
        core.close()

    run(scenario())


def test_a_neighbour_of_a_passed_deadline_is_not_disturbed(
    run: LoopThread, vllm_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        admission = Admission(2**20, 2**20)
        core = core_over(vllm_engine, tiny_model, admission=admission)
        async with serving(core) as server, server.connect("grpc") as teacher, server.connect("http") as other:
            [alone] = await teacher.generate([NEIGHBOUR])
            neighbour = asyncio.create_task(teacher.generate([NEIGHBOUR]))
            await until(lambda: vllm_engine.num_unfinished == 1)
            with pytest.raises(DeadlineExceeded):
                await ask(other, "generate")
            await until(lambda: admission.tokens_in_flight <= NEIGHBOUR_TOKENS, FREED_S)
            assert vllm_engine.num_unfinished <= 1
            [beside] = await neighbour
            np.testing.assert_array_equal(beside.samples[0].token_ids, alone.samples[0].token_ids)
        core.close()

    run(scenario())
