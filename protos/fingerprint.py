"""The tokenizer's fingerprint, taken in the same way by both programs, and the words for a difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from protos.records import TokenizerFingerprint
from protos.service import Detokenizer

UNKNOWN = TokenizerFingerprint(
    vocab_size=0, vocab_sha256="", special_sha256="", eos_token_ids=(), chat_template_sha256=""
)
"""Of a teacher that does not say which tokenizer it has; it matches no student's."""


class Vocabulary(Protocol):
    """The part of a transformers tokenizer that is fingerprinted."""

    @property
    def all_special_tokens(self) -> list[str]: ...  # noqa: D102

    @property
    def chat_template(self) -> str | dict[str, str] | None: ...  # noqa: D102

    def get_vocab(self) -> dict[str, int]: ...  # noqa: D102


def fingerprint(
    *,
    vocab: Mapping[str, int],
    special_tokens: Mapping[str, int],
    eos_token_ids: Iterable[int],
    chat_template: str | None,
    vocab_size: int,
) -> TokenizerFingerprint:
    """The fingerprint of plain data; order of the mappings and of the EOS ids does not matter.

    Args:
        vocab, special_tokens: token to id.
        eos_token_ids: of the generation config and the tokenizer together.
        vocab_size: the width of the model's output, padding rows included.
    """
    return TokenizerFingerprint(
        vocab_size=vocab_size,
        vocab_sha256=_sha256(json.dumps(sorted(vocab.items()))),
        special_sha256=_sha256(json.dumps(sorted(special_tokens.items()))),
        eos_token_ids=tuple(sorted(set(eos_token_ids))),
        chat_template_sha256=_sha256(chat_template) if chat_template else "",
    )


def tokenizer_fingerprint(
    tokenizer: Vocabulary, *, eos_token_ids: Iterable[int], vocab_size: int
) -> TokenizerFingerprint:
    """The fingerprint of a transformers tokenizer beside its model's EOS ids and output width."""
    vocab = tokenizer.get_vocab()
    template = tokenizer.chat_template
    return fingerprint(
        vocab=vocab,
        special_tokens={token: vocab[token] for token in tokenizer.all_special_tokens},
        eos_token_ids=eos_token_ids,
        chat_template=json.dumps(template, sort_keys=True) if isinstance(template, dict) else template,
        vocab_size=vocab_size,
    )


def differences(teacher: TokenizerFingerprint, student: TokenizerFingerprint) -> list[str]:
    """One sentence for each thing the two do not share; empty when an id means the same to both.

    The widths of their outputs may differ: models of one family pad the same vocabulary to different sizes.
    """
    if teacher == UNKNOWN:
        return ["the teacher does not say which tokenizer it has"]
    sentences = []
    if teacher.vocab_sha256 != student.vocab_sha256:
        sentences.append("their vocabularies map tokens to different ids")
    if teacher.special_sha256 != student.special_sha256:
        sentences.append("their special tokens differ")
    if teacher.eos_token_ids != student.eos_token_ids:
        sentences.append(
            f"the teacher ends a text at ids {teacher.eos_token_ids}, the student at {student.eos_token_ids}"
        )
    if teacher.chat_template_sha256 != student.chat_template_sha256:
        sentences.append("their chat templates differ")
    return sentences


class SpellingVocabulary(Protocol):
    """The part of a transformers tokenizer that is compared by its texts."""

    def get_vocab(self) -> dict[str, int]: ...  # noqa: D102

    def decode(self, token_ids: list[int]) -> Any: ...  # noqa: D102


async def spelling_differences(teacher: Detokenizer, student: SpellingVocabulary) -> list[str]:
    """As `differences`, for a teacher that does not say which tokenizer it has.

    The text of the student's whole vocabulary, in the order of ids, is asked of the teacher and must be the student's.
    Ids that are no text of their own (single bytes of a longer character) all read as U+FFFD; EOS ids and the chat
    template stay unknown. Scoring the ids of a prompt and a completion needs neither.
    """
    ids = sorted(student.get_vocab().values())
    same = await teacher.detokenize(ids) == student.decode(ids)
    return [] if same else ["their vocabularies give the same ids different texts"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
