"""What a probe is told: a run's config, and whom to ask. Pydantic only; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from student_trainer.config import ConfigError, TeacherConfig, TrainConfig, parse_config
from student_trainer.config.parse import override_tables, read_tables


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What every probe takes.

    Attributes:
        out: The folder of results, plot and raw answers; one that holds the same probe is gone on with.
        teacher: A teacher's URL, in place of teacher.url.
        student: A model's folder or Hub id, in place of model.path; or the URL of a teacher server that runs the
            student, whose tokenizer is then model.path's.
        problems: held_out takes eval.num_problems of those; all takes as many of both sides.
        max_tokens_total: Stop before more tokens than that are written and scored by both models, prompts not counted;
            the same command with a larger number goes on.
    """

    out: Path
    teacher: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    student: str | None = None
    problems: Literal["held_out", "all"] = "held_out"
    max_tokens_total: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens_total is not None and self.max_tokens_total < 1:
            raise ValueError(f"--max-tokens-total is {self.max_tokens_total}; it must be at least 1")

    @property
    def student_url(self) -> str | None:
        """The student's URL, where it is behind one."""
        return self.student if self.student is not None and "://" in self.student else None


@dataclass(frozen=True)
class ProbeSettings:
    """One probe.

    Attributes:
        config: of the run that is thought of, or of nothing but a task.
        options: what the command line says beside it.
        teachers: whom to ask, at least one.
    """

    config: TrainConfig
    options: ProbeOptions
    teachers: tuple[TeacherConfig, ...]

    @property
    def max_new_tokens(self) -> int:
        """The budget of an answer, as in the evaluation."""
        return self.config.eval.max_new_tokens or self.config.rollout.max_new_tokens

    @property
    def teacher(self) -> TeacherConfig:
        """The only teacher.

        Raises:
            ConfigError: there are several.
        """
        if len(self.teachers) != 1:
            raise ConfigError(f"--teacher was given {len(self.teachers)} times, and this probe asks one teacher")
        return self.teachers[0]


def load_settings(path: Path, overrides: Sequence[str], options: ProbeOptions) -> ProbeSettings:
    """The settings of a probe from a training config, or from a TOML file that has a [task] and what else it needs.

    Raises:
        ConfigError: the file, an override or the result is wrong, or there is no teacher.
    """
    tables = read_tables(path)
    for name, value in (("run", str(options.out)), ("steps", 1), ("stage", {"kind": "opd"})):
        tables.setdefault(name, value)
    if options.student is not None and options.student_url is None:
        tables.setdefault("model", {})["path"] = options.student
    urls = list(options.teacher)
    if urls:
        tables.setdefault("teacher", {})["url"] = urls[0]
    override_tables(tables, overrides)
    config = parse_config(tables)
    if config.teacher is None:
        raise ConfigError("a probe needs a teacher: pass --teacher URL, or set teacher.url")
    teachers = (config.teacher.model_copy(update={"url": url}) for url in urls or [config.teacher.url])
    return ProbeSettings(config, options, tuple(teachers))
