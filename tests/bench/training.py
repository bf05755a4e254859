"""A training step of on-policy distillation beside that of TRL's `DistillationTrainer`: seconds, memory, where they go.

    python -m tests.bench.training [--budget 64] [--repeats 5] [--steps 12]

    ours           reverse KL over the whole vocabulary: TRL's default loss
    ours, top 20   the default loss of this project, on the student's 20 most likely ids
    trl            the same student, teacher, prompts, batch, budget of tokens, sampling and optimiser as `ours`
    trl, 2 threads

All float32 on the same cores, one thread a process but where the name says otherwise. TRL's teacher is a second model
in its process; ours is a teacher server on vLLM, over gRPC, a process of its own, so that its work can go on beside the
rollouts: two threads let TRL use a second core too. Every repeat is a fresh process of each, in turns; ratios are taken
within a repeat. A step is the time between the ends of two optimiser steps (median, the first two left out). Memory is
the peak resident set of the trainer's process up to its last step, in all and above what was resident when its modules
were there and its models were about to be loaded; and with that of the server's processes.

    rollout   the student writes
    score     ours: waiting for the server, behind the rollouts and the student's forward; TRL: the teacher's forward
              (its LM head is in the loss)
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
import torch
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from student_trainer.config import parse_config
from student_trainer.study.teacher_process import teacher_process
from student_trainer.tasks import ToyTask, build_task
from tests.bench.alone import alone
from tests.bench.served import peak_bytes, reset_peak
from tests.bench.tables import interval
from tests.tiny_model import build_tiny_qwen3

PROMPTS = 32
MAX_CONTEXT_TOKENS = 1024
LR = 1e-4
WARM_STEPS = 2
TASK = ToyTask(train_size=500, held_out_size=10)
PARTS = ("rollout", "score", "loss", "step")
NAMES = ("ours", "ours, top 20", "trl", "trl, 2 threads")


@dataclass(frozen=True)
class Run:
    """One side's run: its folder, how many steps, and the tokens that a completion may have."""

    folder: Path
    steps: int
    budget: int


@dataclass(frozen=True)
class Server:
    """The teacher server: where it is, and its process."""

    url: str
    pid: int


def own_peak_bytes() -> int:
    """See `peak_bytes`, of this process alone: cheap enough for a step that is timed."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


@dataclass
class Clock:
    """When each optimiser step began and ended, whoever makes it, and the process's peak memory at its end in bytes."""

    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        register_optimizer_step_pre_hook(lambda *_: self.began.append(time.perf_counter()))
        register_optimizer_step_post_hook(self._end)

    def _end(self, *_: object) -> None:
        self.ended.append(time.perf_counter())
        self.peak = own_peak_bytes()

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
    """One run: median seconds by part, tokens a step, the trainer's peak bytes and those at the start, and the peak
    bytes of a server beside it."""

    seconds: dict[str, float]
    tokens: float
    peak: int
    start: int
    server: int = 0


def ours(student: Path, server: Server, loss: dict[str, Any], run: Run) -> Side:
    import protos._grpc  # noqa: F401  (else imported by the first request)
    from student_trainer.loop import train
    from student_trainer.run_folder import read_rows

    config = parse_config(
        {
            "run": str(run.folder),
            "steps": run.steps,
            "problems_per_step": PROMPTS,
            "model": {"path": str(student)},
            "task": TASK.model_dump(),
            "stage": {"kind": "opd", "loss": loss},
            "teacher": {"url": server.url},
            "rollout": {"max_new_tokens": run.budget},
            "optim": {"lr": LR, "warmup_steps": 0, "final_lr_share": 1.0, "micro_batch_size": PROMPTS},
            "eval": {"num_problems": 1},
            "checkpoint": {"every_steps": run.steps},
        }
    )
    reset_peak(server.pid)
    clock, start = Clock(), reset_peak(os.getpid())
    train(config, quiet=True)
    rows = read_rows(run.folder / "metrics.jsonl")[1:]
    seconds = clock.seconds([row["rollout_s"] for row in rows], [row["score_s"] for row in rows])
    tokens = statistics.mean(row["num_tokens"] for row in rows)
    return Side(seconds, tokens, clock.peak, start, peak_bytes(server.pid))


def trl(student: Path, teacher: Path, threads: int, run: Run) -> Side:
    torch.set_num_threads(threads)
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
        output_dir=str(run.folder),
        max_steps=run.steps,
        per_device_train_batch_size=PROMPTS,
        max_completion_length=run.budget,
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
    return Side(clock.seconds(rollout, score), statistics.mean(tokens), clock.peak, start)


def measure(folder: Path, repeats: int, steps: int, budget: int) -> dict[str, list[Side]]:
    student, teacher = (build_tiny_qwen3(folder, seed=seed, max_context_tokens=MAX_CONTEXT_TOKENS) for seed in (0, 1))
    runs: dict[str, list[Side]] = {name: [] for name in NAMES}
    with teacher_process(teacher, folder / "server") as process:
        server = Server(process.wait()["grpc_url"], process.process.pid)
        for repeat in range(repeats):
            each = [Run(folder / str(repeat) / name, steps, budget) for name in NAMES]
            works = (
                partial(ours, student, server, {"kind": "reverse_kl"}, each[0]),
                partial(ours, student, server, {}, each[1]),
                partial(trl, student, teacher, 1, each[2]),
                partial(trl, student, teacher, 2, each[3]),
            )
            # Each is first in its turn, so that what slows down over time slows all.
            for name, work in list(zip(NAMES, works, strict=True))[:: 1 if repeat % 2 else -1]:
                runs[name].append(alone(work))
                print(f"repeat {repeat}, {name}: {runs[name][-1].seconds['total']:.3f} s a step", flush=True)
    return runs


def show(console: Console, runs: dict[str, list[Side]], budget: int) -> None:
    num_repeats = len(runs["ours"])
    table = Table(title=f"{PROMPTS} prompts, at most {budget} tokens each; medians over {num_repeats} repeats, in MiB")
    for column in ("", "tokens", "s a step", *PARTS, "peak", "above start", "and server"):
        table.add_column(column, justify="right" if column else "left")
    for name, sides in runs.items():
        seconds = [f"{statistics.median(s.seconds[part] for s in sides):.3f}" for part in ("total", *PARTS)]
        tokens = f"{statistics.mean(s.tokens for s in sides):,.0f}"
        memory = [
            f"{statistics.median(sizes) / 2**20:,.0f}"
            for sizes in (
                [side.peak for side in sides],
                [side.peak - side.start for side in sides],
                [side.peak + side.server for side in sides],
            )
        ]
        table.add_row(name, tokens, *seconds, *memory)
    console.print(table)
    for one, other in (("ours", "trl"), ("ours", "trl, 2 threads"), ("ours, top 20", "trl")):
        pairs = list(zip(runs[one], runs[other], strict=True))
        for what, ratios in (
            ("seconds a step", [a.seconds["total"] / b.seconds["total"] for a, b in pairs]),
            ("seconds a token", [a.seconds["total"] / a.tokens / (b.seconds["total"] / b.tokens) for a, b in pairs]),
            ("peak memory", [a.peak / b.peak for a, b in pairs]),
            ("peak memory above the start", [(a.peak - a.start) / (b.peak - b.start) for a, b in pairs]),
            ("peak memory with the server's", [(a.peak + a.server) / b.peak for a, b in pairs]),
        ):
            median, low, high = interval(np.array(ratios))
            console.print(f"{one} / {other}, {what}: {median:.2f} (95 % interval {low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), arguments.repeats, arguments.steps, arguments.budget)
    show(Console(), runs, arguments.budget)


if __name__ == "__main__":
    main()
