"""Makes what `docker compose up` starts from, without the internet: small models of the toy world, in /models.

base      fine-tuned on worked solutions until it is nearly always right
rlvr      base after a short GRPO run, rewarded for right answers
student   a smaller model, stopped early
baselines.json   the held-out accuracy of base and rlvr, on the problems that the students' runs are measured on

A second start finds what is there; one that was interrupted goes on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from student_trainer.config import TrainConfig, load_config, parse_config
from student_trainer.evaluate import evaluate
from student_trainer.export import export
from student_trainer.loop import train
from student_trainer.progress import quiet_libraries
from student_trainer.study.demo import MAX_NEW_TOKENS, Demo, Sizes
from student_trainer.study.measure import load_sampler
from student_trainer.tasks import build_task

MODELS = Path("/models")
WORK = MODELS / "work"
BASELINES = MODELS / "baselines.json"
STUDENT_CONFIG = Path("/students/reverse.toml")
"""Names the held-out problems; every student's config names the same."""

SIZES = Sizes(teacher_steps=200, num_held_out=100)
"""The demo's student, and a teacher of two thirds of its steps (right on 98 of 100 unseen sums, not on 99.9); fewer
problems at the end of each run, whose accuracy nobody reads."""

GRPO_STEPS = 5


def main() -> None:
    """Makes all that is missing."""
    quiet_libraries()
    if BASELINES.exists():
        return
    demo = Demo(WORK, seed=0, sizes=SIZES)
    base = _exported(demo.sft("base", hidden_size=128, steps=SIZES.teacher_steps, seed=0), "base")
    _exported(demo.sft("student", hidden_size=96, steps=SIZES.student_steps, seed=1), "student")
    rlvr = _exported(train(_grpo(base)), "rlvr")
    baselines = {model.name: _accuracy(model) for model in (base, rlvr)}
    BASELINES.write_text(json.dumps(baselines, indent=2) + "\n")


def _grpo(base: Path) -> TrainConfig:
    return parse_config(
        {
            "run": str(WORK / "rlvr"),
            "steps": GRPO_STEPS,
            "problems_per_step": 16,
            "model": {"path": str(base)},
            "task": {"kind": "toy"},
            "stage": {"kind": "grpo"},
            "rollout": {"samples_per_problem": 8, "max_new_tokens": MAX_NEW_TOKENS},
            "optim": {"lr": 1e-4, "warmup_steps": 2},
            "eval": {"num_problems": SIZES.num_held_out},
        }
    )


def _exported(checkpoint: Path, name: str) -> Path:
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    return export(checkpoint, folder)


def _accuracy(model: Path) -> float:
    config = load_config(STUDENT_CONFIG, ())
    task = build_task(config.task)
    return evaluate(load_sampler(model), task, config.eval, max_new_tokens=config.rollout.max_new_tokens).accuracy


if __name__ == "__main__":
    main()
