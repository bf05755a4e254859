"""Text from a request is data: no template engine reads it, and it reaches the model's context as it was sent."""

from __future__ import annotations

import numpy as np
import pytest

from protos.records import Chat, Int32, Message, Privileged, Reference, SystemText, UserPrefix, UserSuffix
from teacher_server.privileged import REFERENCE_TEMPLATES, compose
from teacher_server.tokenizer import ChatTokenizer
from tests.tiny_model import byte_tokenizer

HOSTILE = (
    "{{ 7 * 7 }}",
    "{% for i in range(3) %}x{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set messages = [] %}{# a comment #}",
    "{{ raise_exception('no') }} {{ messages[0]['content'] }} {{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{0.__class__} {text} %s %(a)s ${HOME} `id` \\N{BULLET} \\x41 '\"",
    "-%}\n{%- raw -%}{{",
)


def text_of(prompt: Chat, privileged: Privileged | None = None) -> str:
    tokenizer = ChatTokenizer(byte_tokenizer(), ())
    context: Int32 = compose(prompt, privileged, tokenizer.render).ids
    # One token a byte, so the ids below 256 are the text itself; the special tokens of the template are left out.
    return tokenizer.decode(np.asarray(context))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_message_arrives_verbatim(text: str, role: str) -> None:
    assert text_of(Chat((Message(role, text), Message("user", "go")))) == f"{role}\n{text}\nuser\ngo\nassistant\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_privileged_text_arrives_verbatim(text: str) -> None:
    prompt = Chat((Message("user", "go"),))
    assert text_of(prompt, SystemText(text)) == f"system\n{text}\nuser\ngo\nassistant\n"
    assert text_of(prompt, UserPrefix(text)) == f"user\n{text}\n\ngo\nassistant\n"
    assert text_of(prompt, UserSuffix(text)) == f"user\ngo\n\n{text}\nassistant\n"
    for name, wording in REFERENCE_TEMPLATES.items():
        expected = f"user\ngo\n\n{wording.before}{text}{wording.after}\nassistant\n"
        assert text_of(prompt, Reference(text, template=name)) == expected
