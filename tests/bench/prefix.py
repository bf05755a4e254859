"""What a shared prefix saves: 8 prompts of 800 tokens, 8 completions of 100 each, with reuse of the cache and without.

    python -m tests.bench.prefix [--model tiny] [--model smollm2] [--repeats 5]

Two servers of their own over the same model, measured in turn through gRPC; every repeat has new prompts, so that each
is computed once at least. The largest difference between the two servers' log-probs is printed beside the ratio.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from protos.client import connect
from protos.records import ScoreItem, ScoreResult
from tests.bench.served import served
from tests.bench.tables import interval
from tests.harness import ROOT
from tests.tiny_model import build_tiny_qwen3

NUM_PROMPTS, NUM_ROLLOUTS, CONTEXT, COMPLETION, TOP_K = 8, 8, 800, 100, 20


def groups(rng: np.random.Generator, vocab: int, num_prompts: int = NUM_PROMPTS) -> list[ScoreItem]:
    """All rollouts of all prompts, prompt by prompt, as a trainer sends them."""
    prompts = rng.integers(0, vocab, (num_prompts, CONTEXT)).astype(np.int32)
    return [
        ScoreItem(prompt, rng.integers(0, vocab, COMPLETION).astype(np.int32), temperature=0.7, top_k=TOP_K)
        for prompt in prompts
        for _ in range(NUM_ROLLOUTS)
    ]


async def measure(urls: dict[str, str], vocab: int, repeats: int) -> tuple[dict[str, np.ndarray], float, float]:
    """Seconds of each server, one value a repeat; the largest difference in nats; the share of context tokens read."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in urls}
    difference, cached = 0.0, 0.0
    for repeat in track(range(1 + repeats), "measuring"):
        items = groups(rng, vocab, 1 if repeat == 0 else NUM_PROMPTS)  # the first warms up
        results: dict[str, list[ScoreResult]] = {}
        for name, url in urls.items():
            async with connect(url) as teacher:
                started = time.perf_counter()
                results[name] = await teacher.score(items)
                seconds[name].append(time.perf_counter() - started)
        for a, b in zip(*results.values(), strict=True):
            difference = max(difference, float(np.abs(a.top_logprobs - b.top_logprobs).max()))
        cached = sum(r.num_cached_tokens for r in results["reuse"]) / (len(items) * CONTEXT)
    return {name: np.array(values[1:]) for name, values in seconds.items()}, difference, cached


app = App(name="python -m tests.bench.prefix", help=__doc__, version_flags=[])


@app.default
def main(
    *, model: Annotated[tuple[Literal["tiny", "smollm2"], ...], Parameter(negative="")] = ("tiny",), repeats: int = 5
) -> None:
    """Measures and prints."""
    table = Table(title=f"{NUM_PROMPTS} x {NUM_ROLLOUTS} x ({CONTEXT} + {COMPLETION}) tokens", title_justify="left")
    for column in ("model", "without reuse, s", "with, s", "times faster", "context read from cache", "nats apart"):
        table.add_column(column, justify="right")
    for name in model:
        if name == "tiny":
            path, vocab = build_tiny_qwen3(_folder(), max_context_tokens=2048), 304
        else:
            from student_trainer.study.smollm2 import fetch_smollm2

            path, vocab = fetch_smollm2(ROOT / "models"), 49_152
        with served(path, enable_prefix_caching=False) as plain, served(path) as reusing:
            urls = {"plain": plain.grpc_url, "reuse": reusing.grpc_url}
            seconds, difference, cached = asyncio.run(measure(urls, vocab, repeats))
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*interval(seconds["plain"] / seconds["reuse"]))
        table.add_row(
            name,
            f"{np.median(seconds['plain']):.2f}",
            f"{np.median(seconds['reuse']):.2f}",
            ratio,
            f"{cached:.0%}",
            f"{difference:.1e}",
        )
    Console(width=max(Console().width, 120)).print(table)


def _folder() -> Path:
    folder = ROOT / "runs" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    app()
