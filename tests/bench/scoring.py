"""What a scored token costs: this server beside a stock vLLM server read as others read it, and beside the ceiling.

    python -m tests.bench.scoring [--model tiny] [--model smollm2] [--repeats 7] [--no-grid] [--out runs/bench]

The ceiling is the bare prefill of the same texts through the same AsyncLLM. Everything shares the machine's cores.
Every repeat measures each row once, in turn, so that a slow minute slows them all; ratios are taken within a repeat.
Every text is new to the prefix cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import httpx
import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import track

from protos.client import connect
from protos.records import ScoreItem
from teacher_server.wire_meter import WireMeter
from tests.bench.served import Served, peak_bytes, reset_peak, served
from tests.bench.tables import comparison_table, grid_table
from tests.harness import ROOT
from tests.stock import stock_scores, stock_vllm_server, trl_scores
from tests.tiny_model import build_tiny_qwen3

CONTEXT = 40
TEMPERATURE = 0.7
"""One that a stock server ignores."""

GRID_TOP_K = (1, 20, 64, 256)
GRID_COMPLETION = (50, 200, 1000)
GRID_IN_FLIGHT = (1, 8, 64)

Score = Callable[[Sequence[ScoreItem]], Awaitable[object]]
Open = Callable[[], AbstractAsyncContextManager[Score]]
"""A client's connection, and how it scores a batch."""

LATENCY_IN_FLIGHT = 8


@dataclass(frozen=True)
class Sizes:
    """One batch: `num_items` completions of `completion` tokens from a vocabulary of `vocab` ids; latencies are of
    `num_latencies` requests of one item each."""

    num_items: int
    completion: int
    vocab: int
    num_latencies: int = 64

    @property
    def num_tokens(self) -> int:
        return self.num_items * self.completion


@dataclass(frozen=True)
class Wish:
    """The support that a batch asks for."""

    top_k: int = 20
    num_candidates: int = 0
    half_precision: bool = False

    def items(self, rng: np.random.Generator, sizes: Sizes) -> list[ScoreItem]:
        def ids(*shape: int) -> np.ndarray:
            return rng.integers(0, sizes.vocab, shape).astype(np.int32)

        return [
            ScoreItem(
                ids(CONTEXT),
                ids(sizes.completion),
                temperature=TEMPERATURE,
                top_k=self.top_k,
                candidate_ids=ids(sizes.completion, self.num_candidates) if self.num_candidates else None,
                half_precision=self.half_precision,
            )
            for _ in range(sizes.num_items)
        ]


@dataclass(frozen=True)
class Row:
    """One way to score a batch; `pid` is its server, `url` what can be metered."""

    open: Open
    wish: Wish
    pid: int | None = None
    url: str = ""


def prompts_of(items: Sequence[ScoreItem]) -> list[list[int]]:
    """What the engine computes for a score: context and completion without its last id."""
    return [[*np.asarray(item.prompt).tolist(), *item.completion_ids[:-1].tolist()] for item in items]


def ours(url: str) -> Open:
    @asynccontextmanager
    async def opened() -> AsyncGenerator[Score]:
        async with connect(url) as teacher:
            yield teacher.score

    return opened


def stock(url: str) -> Open:
    @asynccontextmanager
    async def opened() -> AsyncGenerator[Score]:
        with httpx.Client(base_url=url, timeout=None) as client:
            yield lambda items: asyncio.to_thread(stock_scores, client, items)

    return opened


def trl(url: str) -> Open | None:
    try:
        from trl.generation.vllm_client import VLLMClient  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Score]:
        client = VLLMClient(base_url=url, connection_timeout=60.0)
        yield lambda items: asyncio.to_thread(trl_scores, client, items)

    return opened


def forward(model_path: Path) -> Open:
    """A plain transformers forward with log_softmax and topk, one text at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score_all(items: Sequence[ScoreItem]) -> list[Any]:
        results = []
        for item, prompt in zip(items, prompts_of(items), strict=True):
            logits_TV = model(torch.tensor([prompt]), logits_to_keep=len(item.completion_ids)).logits[0]
            results.append(torch.log_softmax(logits_TV / item.temperature, -1).topk(item.top_k))
        return results

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Score]:
        yield lambda items: asyncio.to_thread(score_all, items)

    return opened


def rows_of(model: Path, server: Served, stock_url: str | None) -> dict[str, Row]:
    """Every row of the first table."""
    grpc, http = ours(server.grpc_url), ours(server.http_url)
    rows = {
        "ours, gRPC, K = 20": Row(grpc, Wish(20), server.pid, server.grpc_url),
        "ours, gRPC, K = 20, float16": Row(grpc, Wish(20, half_precision=True), server.pid, server.grpc_url),
        "ours, gRPC, student's 20": Row(grpc, Wish(0, 20), server.pid, server.grpc_url),
        "ours, gRPC, both 20": Row(grpc, Wish(20, 20), server.pid, server.grpc_url),
        "ours, gRPC, K = 64": Row(grpc, Wish(64), server.pid, server.grpc_url),
        "ours, HTTP, K = 20": Row(http, Wish(20), server.pid, server.http_url),
        "ours, HTTP, K = 64": Row(http, Wish(64), server.pid, server.http_url),
        "transformers forward, K = 20": Row(forward(model), Wish(20)),
    }
    if stock_url is not None:
        for top_k in (20, 64):
            rows[f"stock vllm serve, read as TRL does, K = {top_k}"] = Row(stock(stock_url), Wish(top_k), url=stock_url)
            if (client := trl(stock_url)) is not None:
                rows[f"stock vllm serve, TRL's client, K = {top_k}"] = Row(client, Wish(top_k), url=stock_url)
    return rows


async def compare(rows: dict[str, Row], server: Served, sizes: Sizes, repeats: int) -> dict[str, dict[str, Any]]:
    """Tokens a second of each row and of the ceiling, one value a repeat; then bytes and peaks of one more batch, and
    the latencies of requests of one item, some in flight together."""
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"ceiling": []} | {name: [] for name in rows}
    for _ in track(range(1 + repeats), "comparing"):  # the first warms up
        seconds = server.prefill(prompts_of(Wish().items(rng, sizes)), sizes.num_items)
        rates["ceiling"].append(sizes.num_tokens / seconds)
        for name, row in rows.items():
            items = row.wish.items(rng, sizes)
            started = time.perf_counter()
            async with row.open() as score:
                await score(items)
            rates[name].append(sizes.num_tokens / (time.perf_counter() - started))
    results: dict[str, dict[str, Any]] = {name: {"tokens_per_s": values[1:]} for name, values in rates.items()}
    for name, row in track(rows.items(), "latencies, memory, bytes"):
        async with row.open() as score:
            latencies = await latencies_of(
                score, row.wish.items(rng, replace(sizes, num_items=sizes.num_latencies)), LATENCY_IN_FLIGHT
            )
        results[name] |= quantiles_ms(latencies)
        items = row.wish.items(rng, sizes)
        client_before = reset_peak_of_client()
        server_before = None if row.pid is None else reset_peak(row.pid)
        async with row.open() as score:
            await score(items)
        results[name]["client_peak_mib"] = (peak_bytes_of_client() - client_before) / 2**20
        if row.pid is not None and server_before is not None:
            results[name]["server_peak_mib"] = (peak_bytes(row.pid) - server_before) / 2**20
        if row.url:
            results[name]["bytes_per_token"] = await received_bytes(row, row.wish.items(rng, sizes)) / sizes.num_tokens
    return results


async def received_bytes(row: Row, items: Sequence[ScoreItem]) -> int:
    """What came over the wire for these items, everything of the transport counted."""
    parts = urlsplit(row.url)
    assert parts.hostname
    assert parts.port
    client = stock if row.pid is None else ours
    async with WireMeter.to(parts.hostname, parts.port) as meter:
        async with client(f"{parts.scheme}://{meter.address}")() as score:
            await score(items)
        return meter.counts()[1]


async def latencies_of(score: Score, items: Sequence[ScoreItem], in_flight: int) -> list[float]:
    """Seconds of each request of one item, `in_flight` of them at a time."""
    places = asyncio.Semaphore(in_flight)
    latencies: list[float] = []

    async def one(item: ScoreItem) -> None:
        async with places:
            started = time.perf_counter()
            await score([item])
            latencies.append(time.perf_counter() - started)

    await asyncio.gather(*map(one, items))
    return latencies


def quantiles_ms(latencies: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile of seconds, in milliseconds."""
    return {f"p{q}_ms": 1000 * float(np.quantile(latencies, q / 100)) for q in (50, 99)}


def peak_bytes_of_client() -> int:
    return _own_status("VmHWM")


def reset_peak_of_client() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _own_status("VmRSS")


def _own_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


async def grid(server: Served, vocab: int, max_tokens: int) -> list[dict[str, Any]]:
    """Every K, support, length and number in flight, over gRPC: one item a request, at least 64 requests."""
    rng = np.random.default_rng(1)
    cells = [
        (top_k, support, completion, in_flight)
        for completion in GRID_COMPLETION
        for in_flight in GRID_IN_FLIGHT
        for top_k in GRID_TOP_K
        for support in ("teacher", "student", "both")
        if CONTEXT + completion <= max_tokens
    ]
    wishes = {
        "teacher": lambda k: Wish(k),
        "student": lambda k: Wish(0, k),
        "both": lambda k: Wish(k, k),
    }
    ceilings: dict[tuple[int, int], float] = {}
    results = []
    async with connect(server.grpc_url) as teacher:
        for top_k, support, completion, in_flight in track(cells, "grid"):
            sizes = Sizes(max(64, 2 * in_flight) if in_flight > 1 else 16, completion, vocab)
            if (completion, in_flight) not in ceilings:
                prompts = prompts_of(Wish().items(rng, sizes))
                ceilings[completion, in_flight] = sizes.num_tokens / server.prefill(prompts, in_flight)
            items = wishes[support](top_k).items(rng, sizes)
            started = time.perf_counter()
            latencies = await latencies_of(teacher.score, items, in_flight)
            rate = sizes.num_tokens / (time.perf_counter() - started)
            results.append(
                {
                    "top_k": top_k,
                    "support": support,
                    "completion": completion,
                    "in_flight": in_flight,
                    "tokens_per_s": rate,
                    "share": rate / ceilings[completion, in_flight],
                    **quantiles_ms(latencies),
                }
            )
    return results


app = App(name="python -m tests.bench.scoring", help=__doc__, version_flags=[])


@app.default
def main(
    *,
    model: Annotated[tuple[Literal["tiny", "smollm2"], ...], Parameter(negative="")] = ("tiny",),
    repeats: int = 7,
    grid_too: Annotated[bool, Parameter(name="--grid")] = True,
    stock_too: Annotated[bool, Parameter(name="--stock")] = True,
    out: Path = ROOT / "runs" / "bench",
) -> None:
    """Measures and prints; the same numbers are left as JSON in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=max(Console().width, 150))
    for name in model:
        with ExitStack() as stack:
            if name == "tiny":
                path, sizes, max_tokens = build_tiny_qwen3(out, max_context_tokens=2048), Sizes(32, 200, 304), 2048
            else:
                from student_trainer.study.smollm2 import fetch_smollm2

                path, sizes, max_tokens = fetch_smollm2(ROOT / "models"), Sizes(8, 200, 49_152, 16), 2048
            server = stack.enter_context(served(path))
            stock_url = stack.enter_context(stock_vllm_server(path, max_logprobs=64)) if stock_too else None
            results = asyncio.run(compare(rows_of(path, server, stock_url), server, sizes, repeats))
            title = f"{name}: {sizes.num_items} x {sizes.completion} tokens, T = {TEMPERATURE}, {repeats} repeats"
            console.print(comparison_table(title, results))
            (out / f"scoring-{name}.json").write_text(json.dumps(results, indent=1))
            if grid_too and name == "tiny":
                cells = asyncio.run(grid(server, sizes.vocab, max_tokens))
                console.print(grid_table(cells))
                (out / f"grid-{name}.json").write_text(json.dumps(cells, indent=1))


if __name__ == "__main__":
    app()
