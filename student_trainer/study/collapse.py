"""Do the alarms come before a collapse: the biased truncated reverse KL beside the stop-gradient one, all else equal.

1. SFT makes a teacher; the student is the teacher as it was some steps earlier, so that the two agree on most tokens
   and the bias is most of what the biased loss has to follow.
2. Three runs against that teacher, of one seed, one student, the same problems, rate and steps: the stop-gradient loss,
   the biased loss with every default rule only warning, and the biased loss whose leading rules roll back to the last
   good checkpoint and go on with the stop-gradient loss.
3. For each run: the held-out accuracy, which is greedy, and the reward of what the student samples; at which step each
   has fallen to half of its peak, and how many steps before the reward's fall each default rule sounded (its lead).
   Where the biased loss stops, p = q/e on the support, the most likely token is still the teacher's: the samples fall
   apart long before the greedy answers do. The share of a step's time that the monitors took.

The rules are those that a run has by default: nothing in them is chosen here.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.table import Table

from student_trainer import checkpoint
from student_trainer.config import Rule, parse_config
from student_trainer.config.watch import DEFAULT_RULES
from student_trainer.loop import train
from student_trainer.progress import quiet_libraries
from student_trainer.run_folder import read_rows
from student_trainer.study.teacher_process import teacher_process
from student_trainer.study.toy import build_toy_model

app = App(help=__doc__)
console = Console()

TASK = {"kind": "toy", "min_terms": 2, "max_terms": 3, "max_operand": 9, "train_size": 400, "held_out_size": 100}
LEADING = ("reverse_kl", "support_gap")
"""Signals whose default rules warn of a leak before the answers are wrong; here they roll back."""

STABLE = {"kind": "stop_gradient_reverse_kl", "top_k": 2}
BIASED = {"kind": "biased_reverse_kl", "top_k": 2}
"""A top 2 of 22 tokens: with the top 20 the student's mass is all inside, and the bias, P's gradient, is near 0."""


REWARD_STEPS = 10
"""One step's reward, of 32 samples, is known to ± .09 only."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are the study's."""

    hidden_size: int = 64
    teacher_steps: int = 300
    student_steps: int = 270
    """Of those of the teacher."""
    steps: int = 90
    eval_every: int = 10
    lr: float = 5e-4


@dataclass(frozen=True)
class Course:
    """What came of one run.

    Attributes:
        peak: of the held-out accuracy.
        last: held-out accuracy at the end.
        half_step: of the first evaluation below half of the peak so far; None when there was none.
        reward_half_step: likewise of the samples' reward, as a mean of REWARD_STEPS steps.
        alarms: the first step at which each signal's rule sounded.
        watch_share: the monitors' part of the steps' time.
    """

    peak: float
    last: float
    half_step: int | None
    reward_half_step: int | None
    alarms: dict[str, int]
    watch_share: float

    @property
    def leads(self) -> dict[str, int]:
        """Steps from each alarm to the reward's fall, negative where the alarm came after it; empty without a fall."""
        fall = self.reward_half_step
        return {} if fall is None else {name: fall - step for name, step in self.alarms.items()}


@dataclass(frozen=True)
class Collapse:
    """The runs of one seed, in one folder."""

    out: Path
    seed: int
    sizes: Sizes = Sizes()

    def teacher_and_student(self) -> tuple[Path, Path]:
        """Two checkpoints of one SFT run."""
        sizes, run = self.sizes, self.out / "sft"
        initial = self.out / "initial"
        if not initial.exists():
            build_toy_model(initial, hidden_size=sizes.hidden_size, seed=self.seed)
        train(
            parse_config(
                {
                    "run": str(run),
                    "steps": sizes.teacher_steps,
                    "problems_per_step": 32,
                    "seed": self.seed,
                    "model": {"path": str(initial)},
                    "task": TASK,
                    "stage": {"kind": "sft"},
                    "rollout": {"max_new_tokens": 32},
                    "eval": {"num_problems": 100},
                    "optim": {"lr": 3e-3, "betas": [0.9, 0.98], "weight_decay": 0.1, "warmup_steps": 20},
                    "checkpoint": {"every_steps": sizes.student_steps},
                }
            ),
            quiet=True,
        )
        student, teacher = checkpoint.found(run / "checkpoints")
        return teacher, student

    def distil(self, name: str, student: Path, url: str, loss: dict[str, Any], rules: Sequence[Rule]) -> Course:
        """One run of OPD; what tells the runs apart is the loss and the rules."""
        sizes, run = self.sizes, self.out / name
        train(
            parse_config(
                {
                    "run": str(run),
                    "steps": sizes.steps,
                    "problems_per_step": 32,
                    "seed": self.seed,
                    "model": {"path": str(student)},
                    "task": TASK,
                    "stage": {"kind": "opd", "loss": loss},
                    "teacher": {"url": url},
                    "rollout": {"max_new_tokens": 32},
                    "eval": {"num_problems": 100, "every_steps": sizes.eval_every},
                    "optim": {"lr": sizes.lr, "warmup_steps": 5, "final_lr_share": 1.0},
                    "checkpoint": {"every_steps": sizes.eval_every},
                    "watch": {"rules": [rule.model_dump(mode="json", exclude_none=True) for rule in rules]},
                }
            ),
            quiet=True,
        )
        return course(run)

    def run(self, url: str, student: Path) -> dict[str, Course]:
        """The three runs."""
        return {
            "stop-gradient": self.distil("stop-gradient", student, url, STABLE, WARNING),
            "biased": self.distil("biased", student, url, BIASED, WARNING),
            "biased, rolled back": self.distil("rolled-back", student, url, BIASED, ROLLING_BACK),
        }


WARNING = tuple(rule.model_copy(update={"action": "warn"}) for rule in DEFAULT_RULES)
"""The default thresholds without consequences, so that a run collapses before our eyes."""

ROLLING_BACK = tuple(
    Rule.model_validate(rule.model_dump(exclude_none=True) | {"action": "roll_back", "loss": STABLE})
    for rule in WARNING
    if rule.signal in LEADING
)
"""The same thresholds, acted upon."""


def course(run: Path) -> Course:
    """Reads what came of a run from its folder."""
    rows = read_rows(run / "metrics.jsonl")
    evaluated = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    rewarded = [(row["step"], row["reward"]) for row in rows if "reward" in row]
    means = [
        (rewarded[end - 1][0], statistics.fmean(reward for _, reward in rewarded[end - REWARD_STEPS : end]))
        for end in range(REWARD_STEPS, len(rewarded) + 1)
    ]
    sounded = read_rows(run / "alarms.jsonl") if (run / "alarms.jsonl").exists() else []
    first = {alarm["signal"]: alarm["step"] for alarm in reversed(sounded)}
    timed = [row for row in rows if "step_s" in row]
    watch_share = sum(row["watch_s"] for row in timed) / sum(row["step_s"] for row in timed)
    peak, last = max(accuracy for _, accuracy in evaluated), evaluated[-1][1]
    return Course(peak, last, _half_step(evaluated), _half_step(means), first, watch_share)


def _half_step(values: Sequence[tuple[int, float]]) -> int | None:
    """The first step whose value is below half of the highest up to there."""
    peak = 0.0
    for step, value in values:
        peak = max(peak, value)
        if value < peak / 2:
            return step
    return None


@app.default
def main(*, out: Path = Path("runs/collapse"), seeds: tuple[int, ...] = (0, 1, 2), fresh: bool = False) -> None:
    """Run the experiment, or go on with it where it stopped: some minutes a seed.

    Args:
        out: Where models and runs go.
        seeds: One teacher, one student and three runs of each.
        fresh: Forget an earlier experiment in `out`.
    """
    quiet_libraries()
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    table = Table(title="The steps of the falls to half of the peak, and the alarms before them", title_justify="left")
    for column in (
        "seed",
        "run",
        "accuracy: peak",
        "last",
        "fall",
        "reward: fall",
        "alarms (lead in steps)",
        "monitors",
    ):
        table.add_column(column)
    result: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        experiment = Collapse(out / f"seed-{seed}", seed)
        teacher, student = experiment.teacher_and_student()
        with teacher_process(teacher, experiment.out / "server", engine="transformers") as server:
            courses = experiment.run(server.wait()["grpc_url"], student)
        result[str(seed)] = {name: asdict(one) | {"leads": one.leads} for name, one in courses.items()}
        for name, one in courses.items():
            falls = ["never" if step is None else str(step) for step in (one.half_step, one.reward_half_step)]
            accuracies = (f"{one.peak:.2f}", f"{one.last:.2f}")
            table.add_row(str(seed), name, *accuracies, *falls, _alarms(one), f"{one.watch_share:.1%}")
    (out / "collapse.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(table)
    leads = [max(each["biased"]["leads"].values(), default=0) for each in result.values()]
    console.print(f"longest lead of each seed: {leads} steps, median {statistics.median(leads):g}")


def _alarms(one: Course) -> str:
    leads = one.leads
    return ", ".join(f"{name} {step}" + (f" ({leads[name]})" if leads else "") for name, step in one.alarms.items())


if __name__ == "__main__":
    app()
