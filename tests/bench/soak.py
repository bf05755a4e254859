"""Whether a server's memory stays flat: a real vLLM server process under hundreds of thousands of mixed items.

    python -m tests.bench.soak --items 200000

Clients of both transports send requests of mixed sizes and supports; some carry deadlines too short to meet, some give
up, some open a connection for one request, some ask for what is refused. Every answer is checked as every client checks
it, and one item is asked again and again and must not drift. Resident memory of server, engine and client is fitted
against the items scored: the run fails where the 95 % interval of a slope reaches above `MAX_BYTES_PER_ITEM`, or where
tasks, open files, tokens or requests are left when all is done.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import httpx
import matplotlib as mpl
import numpy as np
import psutil
from cyclopts import App
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from protos.client import Teacher, connect
from protos.errors import DeadlineExceeded, InvalidRequest
from protos.records import GenerateItem, ScoreItem, ScoreResult
from tests.server_process import ANY_PORTS, ServerProcess
from tests.tiny_model import VOCAB_SIZE, build_tiny_qwen3

MAX_BYTES_PER_ITEM = 64.0
"""A leaked item would be several KiB: its arrays alone are one. A million items may cost 64 MB at most."""

WARM_UP, MIN_WARM_UP_ITEMS = 0.25, 20_000
"""Items left out of the fit, as a share and at least: the prefix cache is touched once, pools grow to their size, the
allocators settle.
"""

NUM_BLOCKS, T_975 = 16, 2.145
"""The samples are averaged in blocks, which are nearly independent where neighbouring samples are not; Student's t for
a line through 16 of them (14 degrees of freedom)."""

NUM_CLIENTS = 8
SAMPLE_S = 1.0
SETTLE_S = 5.0
"""After which closed connections are gone from both ends."""

PATIENCE_S = 60.0
"""Of requests that are meant to be answered."""

MAX_DRIFT = 1e-5
"""Nats, between the first answer to the same item and any later one: rounding, as batches differ."""

# A small cache is full, and at its final size in memory, long before the warm-up ends.
SERVER_ARGS = ("--engine", "vllm", "--threads", "1", "--kv-cache-gib", "0.0625", "--dtype", "float32", *ANY_PORTS)
SAME_ITEM = ScoreItem(np.arange(8, dtype=np.int32), np.arange(8, 24, dtype=np.int32), temperature=0.7, top_k=20)
MIB = 2**20

app = App(help="Scores mixed items for a long time and fails where memory grows with them.")


@dataclass
class Tally:
    """What happened so far, by name; `items` were scored and checked."""

    target: int
    items: int = 0
    drift: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> bool:
        return self.items >= self.target

    def count(self, results: list[ScoreResult]) -> None:
        """Adds what was scored. (`items += len(await …)` reads `items` before it waits, and would lose all that other
        clients add meanwhile.)"""
        self.items += len(results)


@dataclass(frozen=True)
class Sample:
    """One look at all three processes."""

    items: int
    memory: dict[str, int]
    num_files: int
    num_tasks: float


def random_item(rng: np.random.Generator) -> ScoreItem:
    num_tokens, num_candidates = rng.integers(1, 48), rng.choice([0, 0, 4, 20])
    return ScoreItem(
        rng.integers(0, VOCAB_SIZE, rng.integers(1, 64)).astype(np.int32),
        rng.integers(0, VOCAB_SIZE, num_tokens).astype(np.int32),
        temperature=float(rng.choice([0.5, 1.0, 1.3])),
        top_k=int(rng.choice([0, 1, 20, 64])),
        candidate_ids=rng.integers(0, VOCAB_SIZE, (num_tokens, num_candidates)).astype(np.int32),
        entropy=bool(rng.integers(2)),
    )


async def client(url: str, seed: int, tally: Tally) -> None:
    """Sends requests until the target is met; any answer that is not the one meant ends the run."""
    rng = np.random.default_rng(seed)
    first = None
    async with connect(url) as teacher:
        while not tally.done:
            items = [random_item(rng) for _ in range(rng.integers(1, 17))]
            kind = rng.choice(
                ["score", "alone", "deadline", "gives up", "refused", "generate", "same"],
                p=[0.70, 0.06, 0.06, 0.06, 0.04, 0.03, 0.05],
            )
            match kind:
                case "score":
                    tally.count(await teacher.score(items, timeout_s=PATIENCE_S))
                case "alone":
                    async with connect(url) as other:
                        tally.count(await other.score(items, timeout_s=PATIENCE_S))
                case "deadline":
                    try:
                        tally.count(await teacher.score(items, timeout_s=rng.uniform(0.001, 0.05)))
                    except DeadlineExceeded:
                        tally.outcomes["deadline passed"] += 1
                case "gives up":
                    await give_up(teacher, items, rng.uniform(0, 0.05), tally)
                case "refused":
                    try:
                        await teacher.score([*items, ScoreItem(SAME_ITEM.prompt, SAME_ITEM.completion_ids, top_k=-1)])
                    except InvalidRequest:
                        tally.outcomes["was refused"] += 1
                case "generate":
                    text = GenerateItem(items[0].prompt, max_new_tokens=int(rng.integers(1, 16)), num_samples=2)
                    await teacher.generate([text], timeout_s=PATIENCE_S)
                case "same":
                    [again] = await teacher.score([SAME_ITEM], timeout_s=PATIENCE_S)
                    first = again if first is None else first
                    drift = np.abs(again.sampled_logprobs - first.sampled_logprobs).max()
                    tally.drift = max(tally.drift, float(drift))
                    tally.count([again])
            tally.outcomes[str(kind)] += 1


async def give_up(teacher: Teacher, items: list[ScoreItem], seconds: float, tally: Tally) -> None:
    """Cancels the call after some milliseconds, unless it was faster."""
    asking = asyncio.create_task(teacher.score(items))
    done, _ = await asyncio.wait((asking,), timeout=seconds)
    if done:
        tally.count(asking.result())
        return
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    tally.outcomes["gave up"] += 1


async def look(server: ServerProcess, http: httpx.AsyncClient, tally: Tally) -> Sample:
    """Memory from the operating system, tasks from the server's own metrics."""
    processes = {
        "server": psutil.Process(server.process.pid),
        "engine": server.engines()[0],
        "client": psutil.Process(),
    }
    return Sample(
        tally.items,
        {name: process.memory_info().rss for name, process in processes.items()},
        processes["server"].num_fds(),
        await metric(http, "teacher_tasks"),
    )


async def metric(http: httpx.AsyncClient, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def num_warm_up_items(samples: list[Sample]) -> float:
    """Items that the fit leaves out."""
    return max(WARM_UP * samples[-1].items, MIN_WARM_UP_ITEMS)


def slope(samples: list[Sample], name: str) -> tuple[float, float]:
    """Bytes an item, and the half width of its 95 % interval: least squares over block means after the warm-up."""
    kept = [sample for sample in samples if sample.items >= num_warm_up_items(samples)]
    if len(kept) < 2 * NUM_BLOCKS:
        raise ValueError(
            f"{samples[-1].items} items leave {len(kept)} samples after a warm-up of {num_warm_up_items(samples):.0f} "
            f"items; a slope needs {2 * NUM_BLOCKS}: score more items"
        )
    items = np.array([block.mean() for block in np.array_split([s.items for s in kept], NUM_BLOCKS)])
    memory = np.array([block.mean() for block in np.array_split([s.memory[name] for s in kept], NUM_BLOCKS)])
    centred = items - items.mean()
    line = float(centred @ memory / (centred @ centred))
    residuals = memory - memory.mean() - line * centred
    error = np.sqrt(residuals @ residuals / (NUM_BLOCKS - 2) / (centred @ centred))
    return line, float(T_975 * error)


async def soak(server: ServerProcess, tally: Tally, max_s: float) -> tuple[list[Sample], dict[str, float]]:
    """The samples, and what was left behind once every client was gone."""
    samples: list[Sample] = []
    started = time.monotonic()
    columns = (TextColumn("items"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with httpx.AsyncClient(base_url=server.ready["http_url"]) as http:
        urls = [server.ready["http_url"], server.ready["grpc_url"]]
        for url in urls:  # what a server keeps from its first request on each transport is no leak
            async with connect(url) as teacher:
                await teacher.score([SAME_ITEM], timeout_s=PATIENCE_S)
        await look(server, http, tally)
        await asyncio.sleep(SETTLE_S)
        before = await look(server, http, tally)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("items", total=tally.target)
            clients = [asyncio.create_task(client(urls[i % 2], i, tally)) for i in range(NUM_CLIENTS)]
            while not all(task.done() for task in clients):
                await asyncio.wait(clients, timeout=SAMPLE_S, return_when=asyncio.FIRST_EXCEPTION)
                samples.append(await look(server, http, tally))
                progress.update(bar, completed=min(tally.items, tally.target))
                if any(task.done() and task.exception() for task in clients):
                    break
                if time.monotonic() - started > max_s:
                    tally.target = tally.items
            for task in clients:
                task.cancel()
            failures = [e for e in await asyncio.gather(*clients, return_exceptions=True) if isinstance(e, Exception)]
            if failures:
                raise failures[0]
        await asyncio.sleep(SETTLE_S)
        after = await look(server, http, tally)
        left = {
            name: await metric(http, name)
            for name in ("teacher_tokens_queued", "teacher_tokens_in_flight", "teacher_engine_requests")
        }
    left["open files"] = max(0, after.num_files - before.num_files)
    left["tasks"] = max(0.0, after.num_tasks - before.num_tasks)
    return samples, left


def draw(samples: list[Sample], path: Path) -> None:
    """Memory over items, one panel a process, each on a scale of its own."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for panel, name in zip(panels, samples[0].memory, strict=True):
        panel.plot([s.items for s in samples], [s.memory[name] / MIB for s in samples], linewidth=1)
        panel.axvspan(0, num_warm_up_items(samples), alpha=0.1)
        line, half = slope(samples, name)
        panel.set(title=f"{name}: {line:.1f} ± {half:.1f} bytes an item", xlabel="items scored", ylabel="resident MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(samples: list[Sample], left: dict[str, float], tally: Tally, seconds: float) -> tuple[Table, bool]:
    """The table, and whether all of it is within bounds."""
    table = Table(title=f"{tally.items:,} items in {seconds:,.0f} s", title_justify="left")
    for column in ("", "first MiB", "last MiB", "bytes an item", "95 % interval", f"below {MAX_BYTES_PER_ITEM:g}"):
        table.add_column(column)
    good = tally.drift <= MAX_DRIFT and not any(left.values())
    for name in samples[0].memory:
        line, half = slope(samples, name)
        flat = line + half <= MAX_BYTES_PER_ITEM
        good &= flat
        first, last = (sample.memory[name] / MIB for sample in (samples[0], samples[-1]))
        interval = f"{line - half:.1f} to {line + half:.1f}"
        table.add_row(name, f"{first:.1f}", f"{last:.1f}", f"{line:.1f}", interval, "yes" if flat else "NO")
    return table, good


@app.default
def main(items: int = 200_000, max_minutes: float = 60.0, out: Path = Path("runs/soak/memory.png")) -> None:
    """Soaks a server.

    Args:
        items: items to score.
        max_minutes: ends earlier where the machine is slow.
        out: the plot.
    """
    console, tally = Console(), Tally(items)
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(build_tiny_qwen3(Path(folder)), Path(folder), *SERVER_ARGS) as server,
    ):
        started = time.monotonic()
        samples, left = asyncio.run(soak(server, tally, max_minutes * 60))
        seconds = time.monotonic() - started
    console.print("requests:", dict(sorted(tally.outcomes.items())))
    console.print("left behind:", left, f"largest drift of the same item: {tally.drift:.1e} nats")
    try:
        table, good = report(samples, left, tally, seconds)
    except ValueError as error:
        raise SystemExit(f"the soak tells nothing: {error}") from error
    draw(samples, out)
    console.print(table, f"plot: {out}")
    if not good:
        raise SystemExit("the soak failed: see the table")


if __name__ == "__main__":
    app()
