"""The whole line in minutes, in the toy world: a teacher server on vLLM, a student distilled from it, and the swap.

1. SFT makes a teacher, and a smaller student that stops early.
2. `teacher-server` serves the teacher with vLLM, as a process of its own.
3. The student is trained by OPD against grpc://, and measured on problems that neither model has seen.
4. The swap: the same student, a few steps against http://, and against itself with privileged information (OPSD);
   only the URL and the stage change.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from rich.console import Console
from rich.table import Table

from student_trainer.config import EvalConfig, TrainConfig, parse_config
from student_trainer.evaluate import Evaluation, evaluate
from student_trainer.loop import train
from student_trainer.progress import quiet_libraries
from student_trainer.report import write_report
from student_trainer.rollout.base import SamplingParams
from student_trainer.run_folder import read_rows
from student_trainer.scoring import Scorer
from student_trainer.study.measure import Closeness, load_sampler, measure_closeness, median_of
from student_trainer.study.teacher_process import teacher_process
from student_trainer.study.toy import RULE_MARKS, build_toy_model
from student_trainer.tasks import ToyTask, build_task

app = App(help=__doc__)
console = Console()

NUM_MEASURED = 256
"""Rollouts behind a figure of closeness to the teacher."""

MAX_NEW_TOKENS = 48
"""The longest trace of five terms below ten has 30 tokens."""

SFT_TASK = ToyTask(rule_rate=0.3)
"""Three problems in ten carry a rule, so that both models obey the system message "R"."""

PLAIN_TASK = ToyTask()
RULED_TASK = ToyTask(rule_rate=1.0, show_rule=False)
"""Answers are expected reversed and the prompt does not say so: has the rule become the student's own?"""

SHOWN_RULE_TASK = ToyTask(rule_rate=1.0)


SFT_OPTIM = {"lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.1, "warmup_steps": 50, "micro_batch_size": 64}
OPD_OPTIM = {"lr": 1e-3, "warmup_steps": 20, "micro_batch_size": 64}
"""Without the warm-up, the first steps at this rate undo the student."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are the demo's."""

    teacher_steps: int = 300
    student_steps: int = 150
    opd_steps: int = 240
    swap_steps: int = 10
    opsd_steps: int = 40
    num_train: int = 20_000
    """Problems to train on; every run draws them anew."""
    num_held_out: int = 1000
    """Problems of every evaluation: a 95 % interval of at most ± 3.1 points."""


@dataclass(frozen=True)
class Demo:
    """One demo: its folder, its seed and its sizes."""

    out: Path
    seed: int
    sizes: Sizes = Sizes()

    def sft(self, name: str, *, hidden_size: int, steps: int, seed: int) -> Path:
        """Builds and fine-tunes a toy model; returns its checkpoint."""
        initial = self.out / name / "initial"
        if not initial.exists():
            build_toy_model(initial, hidden_size=hidden_size, seed=seed)
        return train(
            self._config(
                f"{name}/sft",
                SFT_TASK,
                stage={"kind": "sft"},
                model={"path": str(initial)},
                steps=steps,
                seed=seed,
                optim=SFT_OPTIM,
            )
        )

    def distil(self, name: str, student: Path, url: str, stage: dict[str, Any], steps: int) -> Path:
        """Trains the student in `student` against the teacher at `url`; returns its checkpoint."""
        return train(
            self._config(
                name,
                PLAIN_TASK,
                stage=stage,
                model={"path": str(student)},
                teacher={"url": url},
                steps=steps,
                seed=self.seed,
                optim=OPD_OPTIM,
            )
        )

    def _config(self, name: str, task: ToyTask, **tables: Any) -> TrainConfig:
        return parse_config(
            {
                "run": str(self.out / name),
                "task": self._sized(task).model_dump(),
                "problems_per_step": 64,
                "rollout": {"max_new_tokens": MAX_NEW_TOKENS},
                "eval": self._eval.model_dump(),
                **tables,
            }
        )

    def accuracy(self, model: Path, task: ToyTask) -> Evaluation:
        """Greedy accuracy on the task's held-out problems."""
        sized = build_task(self._sized(task))
        return evaluate(load_sampler(model), sized, self._eval, max_new_tokens=MAX_NEW_TOKENS)

    def close_to(self, url: str, model: Path) -> Closeness:
        """How close the teacher at `url` is to the student in `model`, on held-out problems."""
        params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, top_ids=5)
        problems = build_task(self._sized(PLAIN_TASK)).held_out[:NUM_MEASURED]
        with Scorer(url, temperature=1.0, timeout_s=120) as scorer:
            return measure_closeness(load_sampler(model), scorer, problems, params, seed=self.seed)

    @property
    def _eval(self) -> EvalConfig:
        return EvalConfig(num_problems=self.sizes.num_held_out, batch_size=250)

    def _sized(self, task: ToyTask) -> ToyTask:
        return task.model_copy(update={"train_size": self.sizes.num_train, "held_out_size": self.sizes.num_held_out})


@app.default
def main(*, out: Path = Path("runs/demo"), seed: int = 0, fresh: bool = False) -> None:
    """Run the demo, or go on with it where it stopped.

    Args:
        out: Where models, runs and the report go.
        seed: Of the models, the problems and the samples.
        fresh: Forget an earlier demo in `out`.
    """
    quiet_libraries()
    # All cores for the trainer though the teacher has one: the two take turns, and neither spins while it waits.
    torch.set_num_threads(os.cpu_count() or 1)
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    result = run(Demo(out, seed))
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    show(result, write_report(out / "opd"))


def run(demo: Demo) -> dict[str, Any]:
    """All four parts; the figures by name."""
    started = time.monotonic()
    out, seed, sizes = demo.out, demo.seed, demo.sizes
    console.print("[bold]1/4[/] SFT: a teacher, and a smaller student stopped early")
    teacher = demo.sft("teacher", hidden_size=128, steps=sizes.teacher_steps, seed=2 * seed)
    with teacher_process(teacher, out / "server") as server:
        console.print("[bold]2/4[/] teacher-server loads the teacher into vLLM meanwhile")
        student = demo.sft("student", hidden_size=96, steps=sizes.student_steps, seed=2 * seed + 1)
        urls = server.wait()
        console.print(f"[bold]3/4[/] OPD against {urls['grpc_url']}")
        opd = {"kind": "opd"}
        distilled = demo.distil("opd", student, urls["grpc_url"], opd, sizes.opd_steps)
        with teacher_process(student, out / "self-server") as self_server:  # loads meanwhile
            before = demo.close_to(urls["grpc_url"], student)
            after = demo.close_to(urls["grpc_url"], distilled)
            console.print(f"[bold]4/4[/] the swap: the same student against {urls['http_url']}, then against itself")
            demo.distil("swap-http", student, urls["http_url"], opd, sizes.swap_steps)
            stage = {"kind": "opsd", "privileged": {"kind": "system", "text": RULE_MARKS["reversed"]}}
            ruled = demo.distil("swap-opsd", student, self_server.wait()["grpc_url"], stage, sizes.opsd_steps)
    result = {
        "teacher": asdict(demo.accuracy(teacher, PLAIN_TASK)),
        "student_before": asdict(demo.accuracy(student, PLAIN_TASK)),
        "student_after": asdict(demo.accuracy(distilled, PLAIN_TASK)),
        "closeness_before": asdict(before),
        "closeness_after": asdict(after),
        "rule_told": asdict(demo.accuracy(student, SHOWN_RULE_TASK)),
        "rule_before": asdict(demo.accuracy(student, RULED_TASK)),
        "rule_after": asdict(demo.accuracy(ruled, RULED_TASK)),
        "opd_tokens_per_s": median_of(out / "opd", "scored_tokens_per_s"),
        "loss_grpc": losses(out / "opd", sizes.swap_steps),
        "loss_http": losses(out / "swap-http", sizes.swap_steps),
        "seconds": time.monotonic() - started,
    }
    return result | {"gap_recovered": gap_recovered(result)}


def losses(run: Path, num_steps: int) -> list[float]:
    """The loss of each of the first `num_steps` steps."""
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")[1 : num_steps + 1]]


def gap_recovered(result: dict[str, Any]) -> float:
    """(after - before) / (teacher - before), of the accuracies; NaN when there is no gap."""
    before, after, teacher = (result[key]["accuracy"] for key in ("student_before", "student_after", "teacher"))
    return (after - before) / (teacher - before) if teacher > before else math.nan


def show(result: dict[str, Any], report: Path) -> None:
    """Prints the tables."""
    table = Table(title="On-policy distillation over gRPC", title_justify="left")
    for column in ("", "accuracy on unseen problems", "reverse KL to teacher, nats", "overlap of top 5"):
        table.add_column(column)
    before, after = result["closeness_before"], result["closeness_after"]
    table.add_row("teacher", interval(result["teacher"]), "0", "1")
    table.add_row("student before", interval(result["student_before"]), kl(before), f"{before['overlap_ratio']:.3f}")
    table.add_row("student after", interval(result["student_after"]), kl(after), f"{after['overlap_ratio']:.3f}")
    console.print(table)
    console.print(f"share of the gap recovered: [bold]{result['gap_recovered']:.0%}[/]")
    console.print(
        f"tokens scored: {result['opd_tokens_per_s']:,.0f} a second (median step, top 20 and the student's 20)"
    )
    swap = Table(title="The swap: only the URL and the stage changed", title_justify="left")
    for column in ("teacher", "what it shows", "figure"):
        swap.add_column(column)
    pairs = list(zip(result["loss_http"], result["loss_grpc"], strict=True))
    swap.add_row(
        "the same, http://", f"loss of its first {len(pairs)} steps", f"{pairs[0][0]:.4f} to {pairs[-1][0]:.4f}"
    )
    swap.add_row("", "largest difference from grpc://", f"{max(abs(a - b) for a, b in pairs):.1e}")
    swap.add_row("itself, told a rule", "obeys when told (before)", interval(result["rule_told"]))
    swap.add_row("", "obeys when not told, before OPSD", interval(result["rule_before"]))
    swap.add_row("", "obeys when not told, after OPSD", interval(result["rule_after"]))
    console.print(swap)
    console.print(f"report: {report}\n{result['seconds']:.0f} s in all", highlight=False)


def interval(evaluation: dict[str, Any]) -> str:
    """Accuracy and its 95 % interval."""
    low, high = evaluation["interval"]
    return f"{evaluation['accuracy']:.3f}  ({low:.3f} to {high:.3f})"


def kl(closeness: dict[str, Any]) -> str:
    """Reverse KL and two standard errors."""
    return f"{closeness['reverse_kl']:.3f} ± {2 * closeness['standard_error']:.3f}"


if __name__ == "__main__":
    app()
