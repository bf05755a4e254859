"""Where a text goes wrong, for tasks that can tell."""

from __future__ import annotations

from collections.abc import Callable

from student_trainer.study.toy import ANSWER_MARK, LINE_BREAK
from student_trainer.tasks import Problem, TaskConfig, ToyTask

FirstError = Callable[[Problem, str], int | None]
"""The index of the first character of a text that no right answer has there; None where all of it may still be right.
A text whose character i is wrong holds an error from its first i + 1 characters on."""


def error_finder(config: TaskConfig) -> FirstError | None:
    """The toy world's, exact; None for a task that can judge whole answers alone."""
    return first_error_of_sum if isinstance(config, ToyTask) else None


def first_error_of_sum(problem: Problem, text: str) -> int | None:
    """Of a sum in the toy world, which has two right answers: the steps and the total, or the total alone."""
    question = problem.messages[-1].content.split(LINE_BREAK)[0]
    first, *terms = map(int, question.split("+"))
    end = ANSWER_MARK + problem.answer
    steps, total = "", first
    for term in terms:
        steps += f"{total}+{term}={total + term};"
        total += term
    num_right = max(_num_shared(text, right) for right in (steps + end, end))
    return None if num_right == len(text) else num_right


def _num_shared(text: str, right: str) -> int:
    """How many characters the two begin with in common."""
    pairs = enumerate(zip(text, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(right)))
