"""A training step of on-policy distillation beside that of TRL's `DistillationTrainer`: seconds, memory, where they go.

    python -m tests.bench.training [--repeats 5] [--steps 12]

The same student, teacher, prompts, batch, budget of tokens, sampling, optimiser and loss (reverse KL over the whole
vocabulary, float32), one thread a process. TRL's teacher is a second model in its process; ours is a teacher server on
vLLM, over gRPC, a process of its own, so that its work can go on beside the rollouts. Every repeat is a fresh process
of either; ratios are taken within a repeat. A step is the time between the ends of two optimiser steps (median, the
first two left out). Memory is the peak resident set of the trainer's process, in all and above what was resident when
its models were about to be loaded; modules that are imported later are in the latter.

    rollout   the student writes
    score     ours: waiting for the server after the rollouts; TRL: the teacher's forward (its LM head is in the loss)
    step      the optimiser
    loss      the rest: forward, loss, backward, our monitors, logs
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from student_trainer.config import parse_config
from student_trainer.study.teacher_process import teacher_process
from student_trainer.tasks import ToyTask, build_task
from tests.bench.alone import alone
from tests.bench.scoring import interval
from tests.bench.served import peak_bytes, reset_peak
from tests.tiny_model import build_tiny_qwen3

PROMPTS, BUDGET = 32, 64
LR = 1e-4
WARM_STEPS = 2
TASK = ToyTask(train_size=500, held_out_size=10)
PARTS = ("rollout", "score", "loss", "step")


@dataclass
class Clock:
    """When each optimiser step began and ended, whoever makes it."""

    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        register_optimizer_step_pre_hook(lambda *_: self.began.append(time.perf_counter()))
        register_optimizer_step_post_hook(lambda *_: self.ended.append(time.perf_counter()))

    def seconds(self, rollout: list[float], score: list[float]) -> dict[str, float]:
        """The medians by part, `total` among them, from each step's rollout and score seconds."""
        total = np.diff(self.ended)[WARM_STEPS - 1 :]
        parts = {
            "rollout": np.array(rollout[WARM_STEPS:]),
            "score": np.array(score[WARM_STEPS:]),
            "step": np.array(self.ended[WARM_STEPS:]) - np.array(self.began[WARM_STEPS:]),
        }
        parts["loss"] = total - sum(parts.values())
        return {name: float(np.median(values)) for name, values in (parts | {"total": total}).items()}


@dataclass(frozen=True)
class Side:
    """One run: median seconds by part, tokens a step, peak bytes above the start, and bytes at the start."""

    seconds: dict[str, float]
    tokens: float
    extra: int
    start: int


def ours(student: Path, teacher_url: str, folder: Path, steps: int) -> Side:
    from student_trainer.loop import train
    from student_trainer.run_folder import read_rows

    config = parse_config(
        {
            "run": str(folder),
            "steps": steps,
            "problems_per_step": PROMPTS,
            "model": {"path": str(student)},
            "task": TASK.model_dump(),
            "stage": {"kind": "opd", "loss": {"kind": "reverse_kl"}},
            "teacher": {"url": teacher_url},
            "rollout": {"max_new_tokens": BUDGET},
            "optim": {"lr": LR, "warmup_steps": 0, "final_lr_share": 1.0, "micro_batch_size": PROMPTS},
            "eval": {"num_problems": 1},
            "checkpoint": {"every_steps": steps},
        }
    )
    clock, start = Clock(), reset_peak(os.getpid())
    train(config, quiet=True)
    extra = peak_bytes(os.getpid()) - start
    rows = read_rows(folder / "metrics.jsonl")[1:]
    seconds = clock.seconds([row["rollout_s"] for row in rows], [row["score_s"] for row in rows])
    return Side(seconds, statistics.mean(row["num_tokens"] for row in rows), extra, start)


def trl(student: Path, teacher: Path, folder: Path, steps: int) -> Side:
    warnings.filterwarnings("ignore", "TRL currently supports vLLM")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.utils import logging
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    logging.disable_progress_bar()
    rollout: list[float] = []
    score: list[float] = []
    tokens: list[int] = []

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            completions = super()._generate_single_turn(*args, **kwargs)
            rollout.append(time.perf_counter() - started)
            tokens.append(sum(map(len, completions)))
            return completions

    config = DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=PROMPTS,
        max_completion_length=BUDGET,
        beta=1.0,  # reverse KL
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    problems = build_task(TASK).train
    prompts = [{"prompt": [{"role": m.role, "content": m.content} for m in problem.messages]} for problem in problems]
    clock, start = Clock(), reset_peak(os.getpid())
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (student, teacher)]
    trainer = Timed(
        model=models[0],
        teacher_model=models[1],
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(student, padding_side="left"),
    )
    trainer.remove_callback(PrinterCallback)
    began: list[float] = []
    backbone = models[1].base_model
    backbone.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
    backbone.register_forward_hook(lambda *_: score.append(time.perf_counter() - began[-1]))
    trainer.train()
    return Side(clock.seconds(rollout, score), statistics.mean(tokens), peak_bytes(os.getpid()) - start, start)


def measure(folder: Path, repeats: int, steps: int) -> dict[str, list[Side]]:
    student, teacher = (build_tiny_qwen3(folder, seed=seed) for seed in (0, 1))
    runs: dict[str, list[Side]] = {"ours": [], "trl": []}
    with teacher_process(teacher, folder / "server") as server:
        url = server.wait()["grpc_url"]
        for repeat in range(repeats):
            place = folder / str(repeat)
            pair = {
                "ours": partial(ours, student, url, place / "ours", steps),
                "trl": partial(trl, student, teacher, place / "trl", steps),
            }
            # Each is first in its turn, so that what slows down over time slows both.
            for name in list(pair)[:: 1 if repeat % 2 else -1]:
                runs[name].append(alone(pair[name]))
    return runs


def show(console: Console, runs: dict[str, list[Side]]) -> None:
    table = Table(title=f"{PROMPTS} prompts, at most {BUDGET} tokens each; medians over {len(runs['ours'])} repeats")
    for column in ("", "tokens a step", "s a step", *PARTS, "peak above start, MiB", "at start, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, sides in runs.items():
        seconds = [f"{statistics.median(s.seconds[part] for s in sides):.3f}" for part in ("total", *PARTS)]
        tokens = f"{statistics.mean(s.tokens for s in sides):,.0f}"
        memory = [f"{statistics.median(getattr(s, key) for s in sides) / 2**20:,.0f}" for key in ("extra", "start")]
        table.add_row(name, tokens, *seconds, *memory)
    console.print(table)
    pairs = list(zip(runs["ours"], runs["trl"], strict=True))
    for what, ratios in (
        ("seconds a step", [a.seconds["total"] / b.seconds["total"] for a, b in pairs]),
        ("seconds a token", [a.seconds["total"] / a.tokens / (b.seconds["total"] / b.tokens) for a, b in pairs]),
        ("peak memory above the start", [a.extra / b.extra for a, b in pairs]),
        ("peak memory in all", [(a.extra + a.start) / (b.extra + b.start) for a, b in pairs]),
    ):
        median, low, high = interval(np.array(ratios))
        console.print(f"ours / TRL, {what}: {median:.2f} (95 % interval {low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), arguments.repeats, arguments.steps)
    show(Console(), runs)


if __name__ == "__main__":
    main()
