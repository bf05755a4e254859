"""Load on a teacher by URL: many requests in flight, each new to the prefix cache, and what came of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from protos.client import connect
from protos.errors import TeacherError
from protos.records import ScoreItem, TeacherInfo
from teacher_server.commands import BenchConfig
from teacher_server.wire_meter import WireMeter

METERED_SCHEMES = ("http", "grpc")
"""Without TLS, and with one server behind them: the meter takes that server's place."""


@dataclass(frozen=True)
class BenchResult:
    """What came of a load.

    Attributes:
        tokens_per_s: scored tokens a second, whole requests only.
        p50_s, p99_s: seconds from a request to its whole answer; None where nothing succeeded.
        sent_bytes_per_token, received_bytes_per_token: on the wire, everything of the transport counted; None where the
            connection cannot be metered.
        errors: failed requests by their error's name.
    """

    url: str
    config: BenchConfig
    seconds: float
    num_requests: int
    tokens_per_s: float
    p50_s: float | None
    p99_s: float | None
    sent_bytes_per_token: float | None
    received_bytes_per_token: float | None
    errors: dict[str, int]


async def bench(url: str, config: BenchConfig, on_request: Callable[[], None] = lambda: None) -> BenchResult:
    """Warms up with one request, meters one, then loads the teacher for the time or the requests that were asked for.

    Raises:
        TeacherError: the first request failed: nothing of the load could succeed.
    """
    rng = np.random.default_rng(config.seed)
    async with connect(url) as teacher:
        info = await teacher.info()
        await teacher.score([random_item(rng, info, config)], timeout_s=config.timeout_s)
        sent, received = await _bytes_per_token(url, rng, info, config)
        latencies: list[float] = []
        errors: Counter[str] = Counter()
        started = time.perf_counter()
        deadline = None if config.requests is not None else started + config.seconds
        num_left = config.requests

        async def ask_until_done() -> None:
            nonlocal num_left
            while num_left != 0 and (deadline is None or time.perf_counter() < deadline):
                num_left = None if num_left is None else num_left - 1
                items = [random_item(rng, info, config) for _ in range(config.items)]
                asked = time.perf_counter()
                try:
                    await teacher.score(items, timeout_s=config.timeout_s)
                    latencies.append(time.perf_counter() - asked)
                except TeacherError as error:
                    errors[error.name] += 1
                    await asyncio.sleep(error.retry_after_s or 0)
                on_request()

        await asyncio.gather(*(ask_until_done() for _ in range(config.in_flight)))
        seconds = time.perf_counter() - started
    return BenchResult(
        url=url,
        config=config,
        seconds=seconds,
        num_requests=len(latencies) + errors.total(),
        tokens_per_s=len(latencies) * config.items * config.completion_tokens / seconds,
        p50_s=float(np.quantile(latencies, 0.5)) if latencies else None,
        p99_s=float(np.quantile(latencies, 0.99)) if latencies else None,
        sent_bytes_per_token=sent,
        received_bytes_per_token=received,
        errors=dict(errors),
    )


def random_item(rng: np.random.Generator, info: TeacherInfo, config: BenchConfig) -> ScoreItem:
    """An item of random ids of the vocabulary, of the lengths and widths that were asked for."""

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(0, info.tokenizer.vocab_size, shape).astype(np.int32)

    return ScoreItem(
        prompt=ids(config.prompt_tokens),
        completion_ids=ids(config.completion_tokens),
        temperature=config.temperature,
        top_k=config.top_k,
        candidate_ids=ids(config.completion_tokens, config.candidates) if config.candidates else None,
        teacher=config.teacher,
        half_precision=config.half_precision,
    )


async def _bytes_per_token(
    url: str, rng: np.random.Generator, info: TeacherInfo, config: BenchConfig
) -> tuple[float | None, float | None]:
    """Bytes sent and received for a scored token: of one request on a connection that already stands."""
    parts = urlsplit(url)
    if parts.scheme not in METERED_SCHEMES or "," in url or not (parts.hostname and parts.port):
        return None, None
    async with (
        WireMeter.to(parts.hostname, parts.port) as meter,
        connect(f"{parts.scheme}://{meter.address}") as teacher,
    ):
        await teacher.info()
        before = meter.counts()
        items = [random_item(rng, info, config) for _ in range(config.items)]
        await teacher.score(items, timeout_s=config.timeout_s)
        sent, received = (after - start for after, start in zip(meter.counts(), before, strict=True))
    num_tokens = config.items * config.completion_tokens
    return sent / num_tokens, received / num_tokens
