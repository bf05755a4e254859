"""The command line of the trainer. Heavy imports happen inside the commands: `--help` answers at once."""

from __future__ import annotations

import json as jsonlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from protos.errors import TeacherError
from student_trainer.config import ConfigError, ModelConfig, TrainConfig, load_config
from student_trainer.config.recipe import load_plan
from student_trainer.probes.commands import app as probe_app
from student_trainer.stopped import Stopped

USER_ERROR = 2
"""Exit code of a mistake that the user can mend."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended."""

app = App(name="student-trainer", help="Train a student on its own rollouts, scored by a teacher reached by URL.")
app.command(probe_app)


@app.command
def train(config: Path, *overrides: Annotated[str, Parameter()], teacher: str | None = None) -> None:
    """Run the training run in CONFIG, or the runs of a recipe in order, or go on where they stopped.

    Args:
        config: A TOML file; see student_trainer/configs for examples.
        overrides: KEY.PATH=VALUE, for example optim.lr=1e-4 steps=50; for one stage of a recipe stages.NAME.steps=50.
        teacher: The teacher's URL, in place of teacher.url.
    """
    plan = load_plan(config, overrides, teacher=teacher)
    from student_trainer.distributed import is_main, joined
    from student_trainer.progress import quiet_libraries
    from student_trainer.recipe import run_plan
    from student_trainer.report import write_report

    quiet_libraries()
    with joined():
        for settings, last in run_plan(plan):
            if is_main():
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
        output.write_text(jsonlib.dumps({"model": path, **result.metrics()}, indent=2) + "\n")


@app.command
def generate(
    source: str,
    *overrides: Annotated[str, Parameter()],
    prompt: Annotated[list[str], Parameter(negative=())],
    system: str | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Print what a student writes, each completion as it is finished; Ctrl-C ends it.

    Args:
        source: A config or a run folder, of which the last checkpoint writes; or a model's folder or Hub id.
        overrides: KEY.PATH=VALUE for a config, as for train.
        prompt: What the user says; give it again for another prompt.
        system: A system message before every prompt.
        samples: Completions of each prompt.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps everything.
        max_new_tokens: The budget of a completion, in tokens.
        seed: Of the samples.
        json: One JSON object a completion, each on its line.
    """
    model = _model_of(source, overrides)
    from student_trainer.generate import generate as write
    from student_trainer.generate import show, to_json
    from student_trainer.progress import quiet_libraries
    from student_trainer.rollout.base import SamplingParams

    quiet_libraries()
    params = SamplingParams(max_new_tokens, temperature, top_p, num_samples=samples)
    try:
        for rollout in write(model, prompt, params, system=system, seed=seed):
            if json:
                sys.stdout.write(to_json(rollout) + "\n")
                sys.stdout.flush()
            else:
                show(Console(), model.path, rollout)
    except KeyboardInterrupt:
        sys.stderr.write("student-trainer: stopped; every completion above is whole\n")
        sys.exit(INTERRUPTED)


@app.command
def export(run: Path, *, out: Path) -> None:
    """Write a student as a plain model folder, which transformers and vLLM load.

    Args:
        run: A run folder, of which the last checkpoint is taken, or a checkpoint.
        out: The new folder.
    """
    from student_trainer.export import export as write

    Console().print(str(write(run, out)), highlight=False, soft_wrap=True)


@app.command
def init(recipe: str, *, task: str = "jsonl", out: Path | None = None) -> None:
    """Write a commented config to fill in.

    Args:
        recipe: The stage: sft, opd, opsd and so on; a wrong one is answered with all there are.
        task: Where the problems come from: jsonl, dataset, reasoning_gym, toy.
        out: The new file; without it RECIPE.toml.
    """
    from student_trainer.init import write_config

    path = out or Path(f"{recipe}.toml")
    write_config(recipe, task, path)
    Console().print(f"{path}: fill it in, then student-trainer train {path}", highlight=False, soft_wrap=True)


@app.command
def report(*runs: Path, out: Path | None = None) -> None:
    """Write RUN/report.html and RUN/plots from what RUN has logged so far; of several, one page to compare them.

    Args:
        runs: Run folders.
        out: The page that compares several runs; without it report.html here.
    """
    from student_trainer.report import write_comparison, write_report

    if not runs:
        raise ValueError("report of what? Give a run folder, or several to compare")
    if len(runs) == 1 and out:
        raise ValueError(f"--out is for a comparison of several runs; the report of one is {runs[0] / 'report.html'}")
    written = write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, out or Path("report.html"))
    Console().print(str(written), highlight=False, soft_wrap=True)


def main() -> None:
    """The entry point: a mistake is one sentence on standard error and exit code 2."""
    try:
        app()
    except (ConfigError, TeacherError, ValueError, FloatingPointError) as error:
        sys.stderr.write(f"student-trainer: {error}\n")
        sys.exit(USER_ERROR)
    except Stopped as error:
        sys.stderr.write(f"student-trainer: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("student-trainer: stopped; run the same command to go on from the last checkpoint\n")
        sys.exit(INTERRUPTED)


def _model_of(source: str, overrides: Sequence[str]) -> ModelConfig:
    """The last checkpoint of a config or a run folder, or the model that `source` itself names."""
    config = Path(source) / "config.toml" if (Path(source) / "checkpoints").is_dir() else Path(source)
    if config.suffix != ".toml":
        return ModelConfig(path=source)
    settings = load_config(config, overrides)
    return ModelConfig(**{**settings.model.model_dump(), "path": _last_checkpoint(settings), "revision": None})


def _last_checkpoint(settings: TrainConfig) -> str:
    from student_trainer import checkpoint

    found = checkpoint.found(Path(settings.run) / "checkpoints")
    if not found:
        raise ConfigError(f"run {settings.run} has no checkpoint: train it first, or name a model")
    return str(found[-1])
