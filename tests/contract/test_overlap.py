"""A teacher 200 ms away: begun a step ahead, its scores cost the training loop almost nothing."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from protos.records import Message
from student_trainer.pipeline import Pipeline
from student_trainer.rollout.base import SamplingParams
from student_trainer.scoring import Scorer, Wanted
from student_trainer.study.measure import load_sampler
from student_trainer.tasks import Problem
from teacher_server.engines.base import Engine
from tests.bench.overlap import LateEngine
from tests.harness import LoopThread, core_over, start_server

DELAY_S = 0.2
LEARN_S = 0.3
PROBLEMS = [Problem(f"p{i}", (Message("user", f"{i}+1"),), "0") for i in range(4)]


def test_at_least_70_percent_of_the_latency_is_hidden(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path
) -> None:
    """The learner is a wait of LEARN_S, longer than the delay: nothing but the rollouts is left to wait behind."""
    sampler = load_sampler(tiny_model)
    params = SamplingParams(max_new_tokens=4, top_ids=5)

    async def start():
        return await start_server(core_over(LateEngine(transformers_engine, DELAY_S), tiny_model))

    server = run(start())
    waited: dict[int, list[float]] = {0: [], 1: []}
    try:
        with Scorer(server.url("grpc"), temperature=1.0, timeout_s=60) as scorer:

            def begin(step: int):
                return scorer.start(sampler.sample(PROBLEMS, params, seeds=[step] * 4), Wanted(5, 5))

            for max_staleness, seconds in waited.items():
                line = Pipeline(begin, max_staleness=max_staleness, num_steps=6, checkpoint_every=6)
                for step in range(6):
                    started = time.perf_counter()
                    line.take(step)[0].result()
                    seconds.append(time.perf_counter() - started)
                    time.sleep(LEARN_S)
    finally:
        run(server.stop())
    # Steps 1 to 4 begin one step each in both; step 0 of the second begins two, and its last none.
    late, ahead = (statistics.median(waited[n][1:5]) for n in (0, 1))
    assert late >= DELAY_S
    assert (late - ahead) / DELAY_S >= 0.7
