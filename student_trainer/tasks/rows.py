"""Rows of data from outside: checked, and made into a task. The only place that knows what a row may hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, ValidationError, model_validator

from protos.records import Message
from student_trainer.rewards import REWARDS, check_answer
from student_trainer.tasks.config import DatasetTask, JsonlTask
from student_trainer.tasks.problem import Problem, SplitTask, distinct, split


def _as_answer(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number or isinstance(value, str)):
        raise ValueError(f"{value!r} is neither text nor a finite number")
    return str(value)


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: StrictStr = Field(min_length=1)


class _Row(BaseModel):
    """A problem as data sets write it; columns without a field here are left alone."""

    prompt: Annotated[StrictStr, Field(min_length=1)] | None = None
    messages: Annotated[list[_Turn], Field(min_length=1)] | None = None
    answer: Annotated[str, BeforeValidator(_as_answer)]
    reference: StrictStr | None = None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of `prompt` and `messages`")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError(f"`messages` end with role {self.messages[-1].role!r}; the last must be 'user'")
        return self


Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Rows with the place each came from ("train.jsonl:12"), for errors."""


def task_of_rows(config: JsonlTask | DatasetTask, name: str, train_rows: Rows, held_out_rows: Rows | None) -> SplitTask:
    """The task of checked rows; without `held_out_rows`, `config.held_out_fraction` of the prompts is held out.

    Raises:
        ValueError: a row is wrong (its place and field are named), or a prompt is on both sides.
    """
    train = distinct(_problems("train", train_rows, config))
    if held_out_rows is None:
        train, held_out = split(train, config.held_out_fraction)
    else:
        held_out = distinct(_problems("held_out", held_out_rows, config))
    rule = REWARDS[config.reward]
    return SplitTask(
        name=name,
        train=train,
        held_out=held_out,
        score=lambda problem, text: rule.score(problem.answer, text),
        well_formed=lambda _, text: rule.is_well_formed(text),
    )


def _problems(side: str, rows: Rows, config: JsonlTask | DatasetTask) -> Iterator[Problem]:
    for index, (place, raw) in enumerate(rows):
        try:
            row = _Row.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{place}: {field}: {reason}" if field else f"{place}: {reason}") from None
        try:
            check_answer(config.reward, row.answer)
        except ValueError as error:
            raise ValueError(f"{place}: answer: {error}") from None
        turns = [Message(turn.role, turn.content) for turn in row.messages or ()] or [Message("user", row.prompt or "")]
        system = [Message("system", config.system)] if config.system else []
        yield Problem(f"{side}-{index}", (*system, *turns), row.answer, row.reference)
