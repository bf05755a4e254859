"""Which token ends a turn of a chat, found in the same way by both programs."""

from __future__ import annotations

from typing import Any

_CONTENT = "CONTENT"


def turn_end_id(tokenizer: Any) -> int | None:
    """The first special id that the chat template writes after an assistant's message; None where it writes none.

    It need not be the tokenizer's EOS: Qwen3's base model names <|endoftext|>, while its template ends a turn with
    <|im_end|>; Gemma's EOS is <eos> and its turns end with <end_of_turn>.

    Args:
        tokenizer: a transformers tokenizer.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # a template that takes no such chat
        return None
    _, is_found, tail = text.rpartition(_CONTENT)
    if not is_found:
        return None
    special = set(tokenizer.all_special_ids)
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special), None)
