"""How the trainer loads a model's tokenizer, renders a prompt and fingerprints what it loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from protos.records import Int32, Message


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Int32:
    """The prompt's ids, int32 [N]: the messages in the model's chat template, with a generation prompt.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: give it one in tokenizer_config.json")
    ids = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return np.asarray(ids, np.int32)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a text: those of the generation config and the tokenizer's own.

    Raises:
        ValueError: neither names one.
    """
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    named: list[Any] = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    ids = {int(token_id) for token_id in named if token_id is not None}
    if not ids:
        raise ValueError("the model names no EOS id: set eos_token_id in generation_config.json")
    return tuple(sorted(ids))
