"""Scored tokens a second through the network, beside what the same engine does with no log-probs at all.

    python -m tests.bench.scoring

One vLLM engine on a tiny random Qwen3 (a stand-in for a GPU, where overhead dominates), one server over it, one client;
all share the machine's cores. Every repeat measures each row once, in turn, so that a slow minute slows them all; every
request is new to the prefix cache.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np
from rich.console import Console
from rich.table import Table

from protos.records import ScoreItem
from tests.harness import core_over, serving
from tests.tiny_model import build_tiny_qwen3

NUM_ITEMS, CONTEXT, COMPLETION, VOCAB = 32, 40, 200, 304
NUM_REPEATS = 7

Measured = Callable[[Sequence[ScoreItem]], Awaitable[object]]


def items(rng: np.random.Generator, top_k: int, num_candidates: int) -> list[ScoreItem]:
    """A batch of random texts; the temperature is one that stock servers ignore."""
    return [
        ScoreItem(
            rng.integers(0, VOCAB, CONTEXT).astype(np.int32),
            rng.integers(0, VOCAB, COMPLETION).astype(np.int32),
            temperature=0.7,
            top_k=top_k,
            candidate_ids=rng.integers(0, VOCAB, (COMPLETION, num_candidates)).astype(np.int32),
        )
        for _ in range(NUM_ITEMS)
    ]


async def measure() -> Table:
    """Starts the engine and the server, measures, and returns the table."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    from teacher_server.engines.vllm import VllmEngine

    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_qwen3(Path(folder), max_context_tokens=256)
        engine = await VllmEngine.create(str(model), dtype="float32")

    async def prefill(batch: Sequence[ScoreItem]) -> None:
        async def one(i: int, item: ScoreItem) -> None:
            assert isinstance(item.prompt, np.ndarray)
            prompt = tokens_input([*item.prompt.tolist(), *item.completion_ids[:-1].tolist()])
            params = SamplingParams(
                temperature=0.0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            async for _ in engine._llm.generate(prompt, params, f"bare-{time.monotonic_ns()}-{i}"):
                pass

        await asyncio.gather(*(one(i, item) for i, item in enumerate(batch)))

    with tempfile.TemporaryDirectory() as folder:
        core = core_over(engine, build_tiny_qwen3(Path(folder), max_context_tokens=256))
    async with serving(core) as server:
        grpc, http = server.connect("grpc"), server.connect("http")
        rows: dict[str, tuple[Measured, int, int]] = {"bare prefill (the ceiling)": (prefill, 0, 0)}
        for name, teacher in (("gRPC", grpc), ("HTTP", http)):
            for top_k, num_candidates in ((1, 0), (20, 0), (0, 20), (20, 20), (64, 0)):
                label = f"{name}, teacher's {top_k}, student's {num_candidates}"
                rows[label] = (teacher.score, top_k, num_candidates)
        rates = await _rates(rows)
        await grpc.aclose()
        await http.aclose()
    core.close()
    await engine.close()

    table = Table(title=f"{NUM_ITEMS} x {COMPLETION} tokens, {NUM_REPEATS} repeats", title_justify="left")
    for column in ("", "tokens/s, median", "lowest to highest", "share of the ceiling"):
        table.add_column(column)
    ceiling = rates["bare prefill (the ceiling)"]
    for name, values in rates.items():
        share = np.median(values / ceiling)
        table.add_row(name, f"{np.median(values):,.0f}", f"{values.min():,.0f} to {values.max():,.0f}", f"{share:.0%}")
    return table


async def _rates(rows: dict[str, tuple[Measured, int, int]]) -> dict[str, np.ndarray]:
    """Tokens a second of each row, one value a repeat; the first round warms up and is left out."""
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(1 + NUM_REPEATS):
        for name, (score, top_k, num_candidates) in rows.items():
            batch = items(rng, top_k, num_candidates)
            started = time.perf_counter()
            await score(batch)
            rates[name].append(NUM_ITEMS * COMPLETION / (time.perf_counter() - started))
    return {name: np.array(values[1:]) for name, values in rates.items()}


if __name__ == "__main__":
    Console().print(asyncio.run(measure()))
