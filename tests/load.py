"""Many students on one pool: each a process with its own token and its own texts, scoring as fast as it is answered.

    python -m tests.load URL TEXTS.npz NUM_IN_FLIGHT SECONDS

is one of them. It knows the log-probs of its texts beforehand, so that an answer to another student's text, to another
item, or of other weights is seen; TEACHER_TOKEN says who it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protos.client import Teacher, connect
from protos.records import Float32, Int32, ScoreItem, ScoreResult, crc32_of
from tests.harness import ROOT

TOLERANCE = 1e-4
"""Nats, of a float32 teacher: a batch of other texts changes the order of sums. Another text differs by whole nats."""

READY_S = 120.0
NUM_PROMPT, NUM_COMPLETION = 24, 32
NUM_ITEMS = 2
"""Of a student's one request; the same texts again and again."""

Texts = tuple[Int32, Int32]
"""Prompts [I, N] and completions [I, T]."""


@dataclass(frozen=True)
class Outcome:
    """What one student was given.

    Attributes:
        num_items: answered within the time.
        latency_s: the median of a request's.
    """

    num_items: int
    latency_s: float


def texts_of(seed: int, vocab_size: int) -> Texts:
    """One student's texts; no two students share one."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, vocab_size, (NUM_ITEMS, NUM_PROMPT)).astype(np.int32)
    return prompts, rng.integers(0, vocab_size, (NUM_ITEMS, NUM_COMPLETION)).astype(np.int32)


async def write_texts(url: str, folder: Path, tokens: Mapping[str, str]) -> None:
    """Asks for every student's texts while nobody else asks, and writes NAME.npz with them and their log-probs."""
    for seed, (name, token) in enumerate(tokens.items()):
        async with connect(url, token=token) as teacher:
            texts = texts_of(seed, (await teacher.info()).tokenizer.vocab_size)
            results = await teacher.score(items_of(texts), timeout_s=READY_S)
        np.savez(
            folder / f"{name}.npz",
            prompts=texts[0],
            completions=texts[1],
            logprobs=np.stack([result.sampled_logprobs for result in results]),
            weights_version=results[0].weights_version,
        )


def items_of(texts: Texts) -> list[ScoreItem]:
    """The request that asks for all of them."""
    return [ScoreItem(prompt, completion, top_k=4) for prompt, completion in zip(*texts, strict=True)]


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index (Jain, Chiu and Hawe 1984): 1 when all are equal, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def run_students(
    url: str, folder: Path, num_in_flight: Mapping[str, int], seconds: float, *, tokens: Mapping[str, str]
) -> dict[str, Outcome]:
    """Runs students side by side over the texts in `folder`/NAME.npz; AssertionError where one got a wrong answer.

    Args:
        num_in_flight: by student, how many requests it has open at a time.
        seconds: from the moment when all are ready.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, num in num_in_flight.items():
            processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.load", url, str(folder / f"{name}.npz"), str(num), str(seconds)],
                cwd=ROOT,
                env={**os.environ, "TEACHER_TOKEN": tokens[name]},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for process in processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outcomes = {}
        for name, process in processes.items():
            output, errors = process.communicate(timeout=seconds + READY_S)
            assert process.returncode == 0, f"{name}: {errors}"
            outcomes[name] = Outcome(**json.loads(output))
        return outcomes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


async def main(url: str, path: str, num_in_flight: str, seconds: str) -> None:
    """One student."""
    texts = np.load(path)
    items, expected = items_of((texts["prompts"], texts["completions"])), texts["logprobs"]
    version = int(texts["weights_version"])
    async with connect(url) as teacher:
        check(items, await teacher.score(items), expected, version)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        end = time.monotonic() + float(seconds)
        asking = [ask_until(end, teacher, items, expected, version) for _ in range(int(num_in_flight))]
        latencies = [latency for found in await asyncio.gather(*asking) for latency in found]
    outcome = {"num_items": len(items) * len(latencies), "latency_s": float(np.median(latencies or [np.inf]))}
    sys.stdout.write(json.dumps(outcome))


async def ask_until(
    end: float, teacher: Teacher, items: Sequence[ScoreItem], expected: Float32, version: int
) -> list[float]:
    """Seconds of each request that was answered before `end`, one after the other."""
    latencies: list[float] = []
    while (started := time.monotonic()) < end:
        check(items, await teacher.score(items, timeout_s=READY_S), expected, version)
        if time.monotonic() < end:
            latencies.append(time.monotonic() - started)
    return latencies


def check(items: Sequence[ScoreItem], results: Sequence[ScoreResult], expected: Float32, version: int) -> None:
    """AssertionError unless these are the answers to these items, by these weights."""
    for item, result, logprobs in zip(items, results, expected, strict=True):
        assert result.completion_crc32 == crc32_of(item.completion_ids)
        assert result.weights_version == version
        np.testing.assert_allclose(result.sampled_logprobs, logprobs, rtol=0, atol=TOLERANCE)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
