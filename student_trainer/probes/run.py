"""One probe from its settings to its files: opens the models, asks, measures, writes, shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console, RenderableType

from student_trainer.config import ConfigError
from student_trainer.probes.collection import BudgetSpent, Collection
from student_trainer.probes.folder import ProbeFolder
from student_trainer.probes.remote import RemoteModel
from student_trainer.probes.settings import ProbeSettings
from student_trainer.probes.students import ProbedStudent, open_student
from student_trainer.progress import Counter
from student_trainer.run_folder import Row
from student_trainer.tasks import Problem, Task, build_task
from student_trainer.teacher_identity import TeacherIdentity
from student_trainer.text import render_prompt

BUDGETED_BATCH = 16
"""Problems asked about together where there is a budget: no more than these are cut short."""


@dataclass(frozen=True)
class Subjects:
    """What a probe is of: the models, opened and found to fit each other, and the problems they are asked."""

    settings: ProbeSettings
    task: Task
    problems: Sequence[Problem]
    student: ProbedStudent
    teachers: Sequence[RemoteModel]

    @property
    def teacher(self) -> RemoteModel:
        """The first one."""
        return self.teachers[0]


class Probe(Protocol):
    """One of the four."""

    name: str

    @property
    def identity(self) -> Row:
        """What decides the answers beside the models, the problems and the rollouts' settings."""
        ...

    def collect(self, problems: Sequence[Problem], collection: Collection) -> None:
        """Asks what is still to be asked about some problems; raises BudgetSpent."""
        ...

    def is_done(self, problem: Problem, rows: dict[str, Row]) -> bool:
        """Whether every answer about a problem is there."""
        ...

    def result(self, problems: Sequence[Problem], rows: dict[str, Row]) -> Row:
        """The figures, of problems that are done; `verdict` is a list of sentences."""
        ...

    def tables(self, result: Row) -> Sequence[RenderableType]:
        """The result for a terminal."""
        ...

    def plot(self, result: Row) -> bytes:
        """The result as a PNG file."""
        ...


class ProbeKind(Protocol):
    """Makes a probe of its subjects."""

    def __call__(self, subjects: Subjects) -> Probe: ...  # noqa: D102


def run_probe(make: ProbeKind, settings: ProbeSettings, console: Console) -> Row:
    """Runs a probe, or goes on with it; the result is also on disk and on `console`.

    Raises:
        ConfigError: settings, task, student or folder cannot be used, or the budget is too small for one problem.
        TeacherMismatch: a teacher does not fit the student.
        TeacherError: a model could not be asked; the same command goes on.
    """
    options, config = settings.options, settings.config
    task = build_task(config.task)
    problems = _problems(task, settings)
    with ExitStack() as stack:
        student = open_student(config.model, settings.teachers[0], options.student_url)
        stack.callback(student.close)
        teachers = []
        for teacher in settings.teachers:
            teachers.append(RemoteModel(teacher))
            stack.callback(teachers[-1].close)
        subjects = Subjects(settings, task, problems, student, teachers)
        _check_fit(subjects)
        probe = make(subjects)
        folder = ProbeFolder(options.out, _identity(probe, subjects))
        collection = Collection(folder, config.eval.batch_size, options.max_tokens_total)
        _collect(probe, problems, collection)
    done = [problem for problem in problems if probe.is_done(problem, folder.rows)]
    if not done:
        raise ConfigError(
            f"--max-tokens-total {options.max_tokens_total} does not reach for one problem ({folder.num_tokens} tokens "
            "so far): raise it and run the same command to go on"
        )
    counts = {"num_problems": len(done), "num_left": len(problems) - len(done), "num_tokens": folder.num_tokens}
    result = {"probe": probe.name, **counts, **probe.result(done, folder.rows)}
    folder.write(result, probe.plot(result))
    show(console, probe, result, settings)
    return result


def show(console: Console, probe: Probe, result: Row, settings: ProbeSettings) -> None:
    """Prints tables, verdict, and what was left."""
    for table in probe.tables(result):
        console.print(table)
    for sentence in result["verdict"]:
        console.print(sentence, highlight=False)
    options = settings.options
    if result["num_left"]:
        console.print(
            f"Stopped at the budget: {result['num_tokens']:,} of {options.max_tokens_total:,} tokens; "
            f"{result['num_left']} of {result['num_left'] + result['num_problems']} problems are left. Raise "
            "--max-tokens-total and run the same command to go on.",
            highlight=False,
        )
    console.print(f"{options.out}: result.json, plot.png, raw.jsonl", highlight=False, soft_wrap=True)


def _problems(task: Task, settings: ProbeSettings) -> Sequence[Problem]:
    num, side = settings.config.eval.num_problems, settings.options.problems
    found = task.held_out if side == "held_out" else [*task.held_out, *task.train]
    if len(found) < num:
        raise ConfigError(
            f"eval.num_problems is {num}, but task {task.name} has {len(found)} problems ({side}): lower it"
            + (", or take --problems all" if side == "held_out" else "")
        )
    return found[:num]


def _check_fit(subjects: Subjects) -> None:
    config, student = subjects.settings.config, subjects.student
    longest = max(len(render_prompt(student.tokenizer, problem.messages)) for problem in subjects.problems)
    for teacher in subjects.teachers:
        teacher.fit(
            student.fingerprint,
            num_tokens=longest + subjects.settings.max_new_tokens,
            temperature=config.rollout.temperature,
        )


def _identity(probe: Probe, subjects: Subjects) -> dict[str, Any]:
    config, options = subjects.settings.config, subjects.settings.options
    identity = {
        "probe": probe.name,
        "task": config.task.model_dump(mode="json"),
        "problems": options.problems,
        "eval.num_problems": config.eval.num_problems,
        "max_new_tokens": subjects.settings.max_new_tokens,
        "rollout": {"temperature": config.rollout.temperature, "top_p": config.rollout.top_p},
        "seed": config.seed,
        "student": {"path": config.model.path, "revision": config.model.revision, "by_url": bool(options.student_url)},
        "teacher": {str(i): asdict(TeacherIdentity.of(one.info)) for i, one in enumerate(subjects.teachers)},
        **probe.identity,
    }
    return json.loads(json.dumps(identity))


def _collect(probe: Probe, problems: Sequence[Problem], collection: Collection) -> None:
    """Problem by problem, a batch at a time, so that what a budget or a failure cuts short is whole as far as it is."""
    size = collection.batch_size if collection.max_tokens is None else min(BUDGETED_BATCH, collection.batch_size)
    with Counter(f"probe {probe.name}", "problem", len(problems), start=0) as counter:
        for start in range(0, len(problems), size):
            batch = problems[start : start + size]
            try:
                probe.collect(batch, collection)
            except BudgetSpent:
                return
            counter.advance(len(batch), f"{collection.folder.num_tokens:,} tokens")
