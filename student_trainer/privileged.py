"""What a teacher is told of a problem that the student is not: from the config to the contract's typed choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from protos.records import (
    Message,
    Privileged,
    PrivilegedIds,
    Reference,
    SystemText,
    TeacherInfo,
    UserPrefix,
    UserSuffix,
)
from student_trainer.config import (
    AnswerPrivileged,
    IdsPrivileged,
    PrivilegedConfig,
    ReferencePrivileged,
    TextPrivileged,
)
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt
from student_trainer.wording import fill

JOINT = "\n\n"
"""Between privileged text and the text that was there, as a teacher server has it."""

_TEXTS = {"system": SystemText, "user_prefix": UserPrefix, "user_suffix": UserSuffix}


def privileged_of(config: PrivilegedConfig) -> Callable[[Problem], Privileged]:
    """A function from a problem to its privileged information; it raises ValueError for a problem that has none."""
    match config:
        case TextPrivileged():
            place, text = _TEXTS[config.kind], config.text
            assert text is not None, "TrainConfig.privileged has a text, its own or the task's"
            return lambda problem: place(_filled(text, problem))
        case AnswerPrivileged():
            return lambda problem: Reference(problem.answer, config.template)
        case ReferencePrivileged():
            return lambda problem: Reference(_filled("{reference}", problem), config.template)
        case IdsPrivileged():
            ids = PrivilegedIds(np.asarray(config.ids, np.int32))
            return lambda problem: ids
        case _:
            assert_never(config)


def num_context_tokens(tokenizer: PreTrainedTokenizerBase, problem: Problem, privileged: Privileged | None) -> int:
    """Tokens that a teacher reads of a problem before the completion; of a Reference at least so many.

    What a Reference's template says around it is the server's own.

    Raises:
        ValueError: the chat template does not take it.
    """
    if isinstance(privileged, PrivilegedIds):
        return len(privileged.ids) + len(render_prompt(tokenizer, problem.messages))
    try:
        return len(render_prompt(tokenizer, _told(problem.messages, privileged)))
    except TemplateError as error:
        raise ValueError(
            f"problem {problem.id}: the model's chat template does not take its messages with the privileged "
            f"information: {error}"
        ) from error


def refusals(config: PrivilegedConfig, info: TeacherInfo) -> list[str]:
    """Why this teacher cannot be told that, a sentence each; none when it can."""
    is_named = isinstance(config, AnswerPrivileged | ReferencePrivileged)
    kind = "reference" if is_named else config.kind
    if kind not in info.privileged_kinds:
        takes = ", ".join(info.privileged_kinds) or "none"
        return [f"privileged information of the kind {kind} was asked for; the teacher takes {takes}"]
    if is_named and config.template not in info.reference_templates:
        known = ", ".join(info.reference_templates) or "none"
        return [f"the reference template {config.template!r} was asked for; the teacher has {known}"]
    return []


def _told(
    messages: tuple[Message, ...], privileged: SystemText | UserPrefix | UserSuffix | Reference | None
) -> tuple[Message, ...]:
    """The messages as a teacher server joins the privileged text to them."""
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    head, user, tail = messages[:last], messages[last], messages[last + 1 :]
    match privileged:
        case None:
            return messages
        case SystemText(text) if messages[0].role == "system":
            return (Message("system", text + JOINT + messages[0].content), *messages[1:])
        case SystemText(text):
            return (Message("system", text), *messages)
        case UserPrefix(text):
            return (*head, Message(user.role, text + JOINT + user.content), *tail)
        case UserSuffix(text) | Reference(text):
            return (*head, Message(user.role, user.content + JOINT + text), *tail)


def _filled(text: str, problem: Problem) -> str:
    try:
        return fill(text, {"answer": problem.answer, "reference": problem.reference})
    except ValueError as error:
        raise ValueError(f"problem {problem.id}, of which the teacher is to be told more, has {error}") from None
