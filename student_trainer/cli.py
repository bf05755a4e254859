"""The command line of the trainer. Heavy imports happen inside the commands: `--help` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from protos.errors import TeacherError
from student_trainer.config import ConfigError, ModelConfig, TrainConfig, load_config

USER_ERROR = 2
"""Exit code of a mistake that the user can mend."""

app = App(name="student-trainer", help="Train a student on its own rollouts, scored by a teacher reached by URL.")


@app.command
def train(config: Path, *overrides: Annotated[str, Parameter()], teacher: str | None = None) -> None:
    """Run the training run in CONFIG, or go on with it where it stopped.

    Args:
        config: A TOML file; see student_trainer/configs for examples.
        overrides: KEY.PATH=VALUE, for example optim.lr=1e-4 steps=50.
        teacher: The teacher's URL, in place of teacher.url.
    """
    settings = load_config(config, [*overrides, *([f"teacher.url={teacher}"] if teacher else [])])
    from student_trainer.distributed import is_main
    from student_trainer.loop import train as run
    from student_trainer.progress import quiet_libraries
    from student_trainer.report import write_report

    quiet_libraries()
    last = run(settings)
    if not is_main():
        return
    report = write_report(Path(settings.run))
    Console().print(f"student: {last}\nreport:  {report}", highlight=False, soft_wrap=True)


@app.command(name="eval")
def evaluate(
    config: Path, *overrides: Annotated[str, Parameter()], model: str | None = None, output: Path | None = None
) -> None:
    """Measure a model's greedy accuracy on the held-out problems of CONFIG's task.

    Args:
        config: A TOML file, as for train.
        overrides: KEY.PATH=VALUE, for example eval.num_problems=1000.
        model: A folder or Hub id; without it, the last checkpoint of CONFIG's run.
        output: Where to write the figures as JSON.
    """
    settings = load_config(config, overrides)
    path = model or _last_checkpoint(settings)
    from student_trainer.evaluate import evaluate as measure
    from student_trainer.progress import quiet_libraries
    from student_trainer.rollout.transformers import TransformersSampler
    from student_trainer.student import load_student
    from student_trainer.tasks import build_task

    quiet_libraries()
    student = load_student(ModelConfig(**{**settings.model.model_dump(), "path": path}))
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    budget = settings.eval.max_new_tokens or settings.rollout.max_new_tokens
    result = measure(sampler, build_task(settings.task), settings.eval, max_new_tokens=budget)
    low, high = result.interval
    Console().print(
        f"{path}: accuracy {result.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}) on {result.num_problems} "
        f"held-out problems; well-formed {result.well_formed:.3f}, cut short {result.truncation_rate:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    if output:
        output.write_text(json.dumps({"model": path, **result.metrics()}, indent=2) + "\n")


@app.command
def report(run: Path) -> None:
    """Write RUN/report.html and RUN/plots from what RUN has logged so far.

    Args:
        run: A run folder.
    """
    from student_trainer.report import write_report

    Console().print(str(write_report(run)), highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: a mistake is one sentence on standard error and exit code 2."""
    try:
        app()
    except (ConfigError, TeacherError, ValueError, FloatingPointError, ConnectionError) as error:
        sys.stderr.write(f"student-trainer: {error}\n")
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("student-trainer: stopped; run the same command to go on from the last checkpoint\n")
        sys.exit(130)


def _last_checkpoint(settings: TrainConfig) -> str:
    from student_trainer import checkpoint

    found = checkpoint.found(Path(settings.run) / "checkpoints")
    if not found:
        raise ConfigError(f"run {settings.run} has no checkpoint: train it first, or pass --model")
    return str(found[-1])
