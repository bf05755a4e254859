"""How much of a slow teacher the pipeline hides: seconds a step with `rollout.max_staleness` 0 and 1, and no delay.

    python -m tests.bench.overlap

A real server over the transformers engine answers each request 200 ms late; it runs in this process, so its own
forward and the learner share the processor. Every run is the same but for the two settings; step times are medians over
the steps that neither begin nor end a segment between checkpoints. Hidden = 1 - (ahead - plain) / (late - plain).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import structlog

from student_trainer.config import parse_config
from student_trainer.loop import train
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import build_toy_model
from teacher_server.engines.base import Engine, ScoreRows, ScoreTask
from teacher_server.engines.transformers import TransformersEngine
from tests.harness import EngineOver, LoopThread, core_over, start_server

STEPS = 12


@dataclass
class LateEngine(EngineOver[Engine]):
    """A real engine whose answers come `delay_s` seconds late, each on its own; nothing is held up by the wait."""

    delay_s: float = 0.2

    async def score(self, task: ScoreTask) -> ScoreRows:
        await asyncio.sleep(self.delay_s)
        return await self.inner.score(task)


def step_seconds(
    url: str, model: Path, folder: Path, *, max_staleness: int, steps: int = STEPS, problems: int = 32
) -> float:
    """The median step of one run, in seconds."""
    config = parse_config(
        {
            "run": str(folder),
            "steps": steps,
            "problems_per_step": problems,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 200, "held_out_size": 10},
            "stage": {"kind": "opd"},
            "teacher": {"url": url},
            "rollout": {"max_new_tokens": 24, "max_staleness": max_staleness},
            "optim": {"micro_batch_size": 8},
            "eval": {"num_problems": 1},
            "checkpoint": {"every_steps": steps},
        }
    )
    train(config, quiet=True)
    rows = read_rows(folder / "metrics.jsonl")[2:-1]
    return statistics.median(row["step_s"] for row in rows)


def measure(folder: Path, delay_s: float, *, steps: int = STEPS, hidden_size: int = 128) -> dict[str, float]:
    """Step seconds by name: `plain` (no delay), `late` (delay, nothing ahead) and `ahead` (delay, one step ahead)."""
    student = build_toy_model(folder / "student", hidden_size=hidden_size, num_layers=2)
    teacher = build_toy_model(folder / "teacher", hidden_size=32, num_layers=1, seed=1)
    loop = LoopThread()
    inner = TransformersEngine(str(teacher))
    seconds: dict[str, float] = {}
    for name, delay, max_staleness in (("plain", 0.0, 0), ("late", delay_s, 0), ("ahead", delay_s, 1)):

        async def start(delay: float = delay):
            return await start_server(core_over(LateEngine(inner, delay), teacher))

        server = loop(start())
        try:
            seconds[name] = step_seconds(
                server.url("grpc"), student, folder / name, max_staleness=max_staleness, steps=steps
            )
        finally:
            loop(server.stop())
    loop(inner.close())
    loop.close()
    return seconds


def hidden_share(seconds: dict[str, float]) -> float:
    """The share of the added latency that no step waits for."""
    return 1 - (seconds["ahead"] - seconds["plain"]) / (seconds["late"] - seconds["plain"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-s", type=float, default=0.2)
    delay_s = parser.parse_args().delay_s
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), delay_s)
    for name, value in seconds.items():
        print(f"{name:6} {1000 * value:7.1f} ms a step")
    print(f"hidden {hidden_share(seconds):7.0%} of {1000 * delay_s:.0f} ms")


if __name__ == "__main__":
    main()
