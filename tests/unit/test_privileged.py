"""Composition of the teacher's context, over a renderer whose output can be read off."""

from __future__ import annotations

import numpy as np
import pytest

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
from teacher_server.privileged import REFERENCE_TEMPLATES, compose


def render(messages: tuple[Message, ...]) -> Int32:
    """One id a byte of "role:content|" for each message."""
    return np.frombuffer("".join(f"{m.role}:{m.content}|" for m in messages).encode(), np.uint8).astype(np.int32)


def text_of(ids: Int32) -> str:
    return bytes(ids.tolist()).decode()


QUESTION = Chat((Message("user", "first"), Message("assistant", "ok"), Message("user", "why?")))
WITH_SYSTEM = Chat((Message("system", "Be kind."), Message("user", "why?")))
ANSWER = REFERENCE_TEMPLATES["answer"]


@pytest.mark.parametrize(
    ("chat", "privileged", "expected"),
    [
        (QUESTION, None, "user:first|assistant:ok|user:why?|"),
        (QUESTION, SystemText("Hint."), "system:Hint.|user:first|assistant:ok|user:why?|"),
        (WITH_SYSTEM, SystemText("Hint."), "system:Hint.\n\nBe kind.|user:why?|"),
        (QUESTION, UserPrefix("Hint."), "user:first|assistant:ok|user:Hint.\n\nwhy?|"),
        (QUESTION, UserSuffix("Hint."), "user:first|assistant:ok|user:why?\n\nHint.|"),
        (WITH_SYSTEM, Reference("42"), f"system:Be kind.|user:why?\n\n{ANSWER.before}42{ANSWER.after}|"),
    ],
)
def test_text_goes_where_it_belongs(chat: Chat, privileged: Privileged | None, expected: str) -> None:
    context = compose(chat, privileged, render)
    assert text_of(context.ids) == expected
    assert context.num_prompt_tokens == len(render(chat.messages))
    assert context.num_privileged_tokens == len(expected) - len(render(chat.messages))


@pytest.mark.parametrize("text", ["{text}", "%s {0} {{x}}", "${HOME}", "\\1", "{% raise %}"])
@pytest.mark.parametrize("template", REFERENCE_TEMPLATES)
def test_text_is_data_and_never_a_template(text: str, template: str) -> None:
    wording = REFERENCE_TEMPLATES[template]
    context = compose(WITH_SYSTEM, Reference(text, template), render)
    assert text_of(context.ids).endswith(f"why?\n\n{wording.before}{text}{wording.after}|")


def test_ids_stand_before_ids_and_before_a_rendered_chat() -> None:
    secret = PrivilegedIds(np.array([7, 8], np.int32))
    context = compose(np.array([1, 2, 3], np.int32), secret, render)
    assert context.ids.tolist() == [7, 8, 1, 2, 3]
    assert (context.num_prompt_tokens, context.num_privileged_tokens) == (3, 2)
    context = compose(QUESTION, secret, render)
    assert context.ids.tolist() == [7, 8, *render(QUESTION.messages).tolist()]


@pytest.mark.parametrize("privileged", [SystemText("x"), UserPrefix("x"), UserSuffix("x"), Reference("x")])
def test_text_cannot_join_ids(privileged: Privileged) -> None:
    with pytest.raises(InvalidRequest, match="send the prompt as chat, or privileged ids") as caught:
        compose(np.array([1], np.int32), privileged, render)
    assert caught.value.field == "privileged"


def test_text_needs_a_user_message_to_join() -> None:
    with pytest.raises(InvalidRequest, match="no user message"):
        compose(Chat((Message("system", "x"),)), UserPrefix("y"), render)
