"""What a teacher is told of a problem that the student is not: from the config to the contract's typed choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from protos.records import Privileged, Reference, SystemText
from student_trainer.config import AnswerPrivileged, ReferencePrivileged, SystemPrivileged
from student_trainer.tasks import Problem


def privileged_of(
    config: SystemPrivileged | ReferencePrivileged | AnswerPrivileged,
) -> Callable[[Problem], Privileged]:
    """A function from a problem to its privileged information; it raises ValueError for a problem that has none."""
    match config:
        case SystemPrivileged():
            return lambda problem: SystemText(config.text)
        case ReferencePrivileged():
            return lambda problem: Reference(_reference(problem), config.template)
        case AnswerPrivileged():
            return lambda problem: Reference(problem.answer, config.template)
        case _:
            assert_never(config)


def _reference(problem: Problem) -> str:
    if problem.reference is None:
        raise ValueError(f"problem {problem.id} has no reference, and the teacher's privileged information is it")
    return problem.reference
