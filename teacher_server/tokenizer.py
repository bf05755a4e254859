"""The served model's tokenizer: chats to ids, ids to text, and its fingerprint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jinja2 import TemplateError

from protos.errors import InvalidRequest
from protos.fingerprint import tokenizer_fingerprint
from protos.records import Int32, Message, TokenizerFingerprint
from protos.turn_end import turn_end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTokenizer:
    """A transformers tokenizer with the ids that end a text; not safe to use from two threads at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids

    @classmethod
    def load(cls, model: str, revision: str | None = None) -> ChatTokenizer:
        """The tokenizer of a model folder or hub name; OSError where there is none. Remote code is never run."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        own = {tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None}
        return cls(tokenizer, tuple(sorted({*own, *_generation_eos_ids(model, revision)})))

    def render(self, messages: tuple[Message, ...]) -> Int32:
        """The chat's ids with a generation prompt, int32 [N]; InvalidRequest where the template refuses it."""
        if self._tokenizer.chat_template is None:
            raise InvalidRequest("this model has no chat template; send prompt_ids", field="chat")
        try:
            ids = self._tokenizer.apply_chat_template(
                [vars(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", field="chat") from error
        return np.array(ids, np.int32)

    def decode(self, ids: Int32) -> str:
        """The ids' text, special tokens left out."""
        text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def fingerprint(self, vocab_size: int) -> TokenizerFingerprint:
        """The fingerprint beside a model whose output has `vocab_size` rows."""
        return tokenizer_fingerprint(self._tokenizer, eos_token_ids=self.eos_token_ids, vocab_size=vocab_size)


def _generation_eos_ids(model: str, revision: str | None) -> tuple[int, ...]:
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:  # a model without generation_config.json
        return ()
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
