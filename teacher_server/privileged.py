"""Composes the teacher's context from a prompt and its privileged information; pure.

Privileged text is data: it is joined, never formatted. It goes into the context and nowhere else, so the completion's
rows keep their places whatever the teacher was told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from protos.errors import InvalidRequest
from protos.records import (
    Chat,
    Int32,
    Message,
    Privileged,
    PrivilegedIds,
    Reference,
    SystemText,
    UserPrefix,
    UserSuffix,
)

ROLES = ("system", "user", "assistant")
JOINT = "\n\n"
"""Between privileged text and the text that was there."""


@dataclass(frozen=True)
class Wording:
    """What stands before and after a reference."""

    before: str
    after: str


REFERENCE_TEMPLATES = {
    "plain": Wording("", ""),
    "answer": Wording(
        "The reference answer to this problem is:\n\n",
        "\n\nIt is given for your own orientation. Work the problem out step by step, as if you had not seen it.",
    ),
    "solution": Wording(
        "Here is a reference solution to this problem:\n\n",
        "\n\nAfter you have understood it, solve the problem yourself, in your own words and step by step.",
    ),
}
"""How a Reference is worded, by name; appended to the last user message, as OPSD conditions its teacher."""

Render = Callable[[tuple[Message, ...]], Int32]
"""A chat's ids under the model's chat template, generation prompt included."""


@dataclass(frozen=True)
class Context:
    """What precedes the completion.

    Attributes:
        ids: int32 [C].
        num_prompt_tokens: of the prompt alone, as the student sees it.
        num_privileged_tokens: what privileged information added; the two sum to C.
    """

    ids: Int32
    num_prompt_tokens: int
    num_privileged_tokens: int


def compose(prompt: Int32 | Chat, privileged: Privileged | None, render: Render) -> Context:
    """The teacher's context; the completion's ids follow it verbatim.

    Raises:
        InvalidRequest: the privileged information cannot be placed into this prompt; the field is relative to the item.
    """
    if isinstance(prompt, Chat):
        _check_roles(prompt.messages)
        prompt_ids = render(prompt.messages)
    else:
        prompt_ids = prompt
    match privileged:
        case None:
            ids = prompt_ids
        case PrivilegedIds(privileged_ids):
            ids = np.concatenate([privileged_ids, prompt_ids])
        case _ if isinstance(prompt, Chat):
            ids = render(_told(prompt.messages, privileged))
        case _:
            raise InvalidRequest(
                "privileged text needs a prompt of messages; send the prompt as chat, or privileged ids",
                field="privileged",
            )
    return Context(ids, len(prompt_ids), len(ids) - len(prompt_ids))


def _check_roles(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise InvalidRequest("the chat has no messages; send at least one", field="chat.messages")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"role is {message.role!r}; it must be one of {', '.join(ROLES)}", field=f"chat.messages[{i}].role"
            )


def _told(
    messages: tuple[Message, ...], privileged: SystemText | UserPrefix | UserSuffix | Reference
) -> tuple[Message, ...]:
    """The messages with the privileged text in them."""
    match privileged:
        case SystemText(text) if messages[0].role == "system":
            return (Message("system", text + JOINT + messages[0].content), *messages[1:])
        case SystemText(text):
            return (Message("system", text), *messages)
        case UserPrefix(text):
            return _in_last_user_message(messages, text + JOINT, "")
        case UserSuffix(text):
            return _in_last_user_message(messages, "", JOINT + text)
        case Reference(text, template):
            if template not in REFERENCE_TEMPLATES:
                raise InvalidRequest(
                    f"no reference template {template[:80]!r} here; there are {', '.join(REFERENCE_TEMPLATES)}",
                    field="privileged.reference.template",
                )
            wording = REFERENCE_TEMPLATES[template]
            return _in_last_user_message(messages, "", JOINT + wording.before + text + wording.after)


def _in_last_user_message(messages: tuple[Message, ...], before: str, after: str) -> tuple[Message, ...]:
    for i in reversed(range(len(messages))):
        if messages[i].role == "user":
            told = replace(messages[i], content=before + messages[i].content + after)
            return (*messages[:i], told, *messages[i + 1 :])
    raise InvalidRequest("the chat has no user message to join the privileged text to", field="privileged")
