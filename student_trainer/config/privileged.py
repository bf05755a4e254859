"""What a teacher is told that the student is not: every choice of the contract."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from student_trainer.config.base import Section
from student_trainer.wording import Wording


class TextPrivileged(Section):
    """Privileged information in words of one's own."""

    kind: Literal["system", "user_prefix", "user_suffix"]
    """Where the text stands: as the system message, or before or after the user's own text."""
    text: Wording | None = None
    """{answer} and {reference} in it are replaced by each problem's own; None takes the task's `privileged_text`."""


class AnswerPrivileged(Section):
    """Privileged information: each problem's own answer, after the user's text, in the server's words."""

    kind: Literal["answer"]
    template: str = "answer"
    """One of the server's templates (see `TeacherInfo.reference_templates`)."""


class ReferencePrivileged(Section):
    """Privileged information: each problem's own reference solution, after the user's text, in the server's words."""

    kind: Literal["reference"]
    template: str = "solution"
    """One of the server's templates."""


class IdsPrivileged(Section):
    """Privileged information: token ids before the prompt's own, the same for every problem."""

    kind: Literal["ids"]
    ids: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Of the teacher's vocabulary; this kind alone is taken by stock OpenAI-compatible servers."""


PrivilegedConfig = Annotated[
    TextPrivileged | AnswerPrivileged | ReferencePrivileged | IdsPrivileged, Field(discriminator="kind")
]
