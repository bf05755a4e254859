"""How the trainer renders a prompt, which ids end a completion, and the chat templates for models that have none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from protos.records import Int32, Message
from protos.turn_end import turn_end_id as template_turn_end_id

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Turns between <|im_start|> and <|im_end|>, which the tokenizer must have."""

PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Turns under their speakers' names, in words that any tokenizer has; the tokenizer's own EOS ends the assistant's."""

TEMPLATES = {"chatml": CHATML, "plain": PLAIN}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> None:
    """Gives the tokenizer the template `chosen`: a key of TEMPLATES or a Jinja file; None keeps its own.

    Raises:
        ValueError: there is no such template, the tokenizer cannot write it, or it has none of its own.
    """
    if chosen is None:
        if not tokenizer.chat_template:
            raise ValueError(
                'the tokenizer has no chat template: set model.chat_template to "plain", "chatml" or a Jinja file'
            )
        return
    if chosen not in TEMPLATES and not Path(chosen).is_file():
        raise ValueError(f'model.chat_template {chosen!r} is neither a file nor one of "plain" and "chatml"')
    missing = {"<|im_start|>", "<|im_end|>"} - tokenizer.get_vocab().keys()
    if chosen == "chatml" and missing:
        raise ValueError(
            f'model.chat_template "chatml" needs {" and ".join(sorted(missing))}, which the tokenizer lacks: '
            'take "plain"'
        )
    tokenizer.chat_template = TEMPLATES.get(chosen) or Path(chosen).read_text()


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Int32:
    """The prompt's ids, int32 [N]: the messages in the model's chat template, with a generation prompt.

    The template writes every special token, a BOS too; the tokenizer adds none of its own.
    """
    ids = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return np.asarray(ids, np.int32)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an assistant's turn: the chat template's, or the tokenizer's EOS where it writes none.

    Raises:
        ValueError: there is neither.
    """
    token_id = template_turn_end_id(tokenizer)
    if token_id is None:
        token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise ValueError(
            "the chat template ends no turn with a special token, and the tokenizer has no EOS: give it one"
        )
    return token_id


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a text: those of the generation config, the tokenizer's own, and the chat turn's."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    named: list[Any] = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return tuple(sorted({*(int(i) for i in named if i is not None), turn_end_id(tokenizer)}))
