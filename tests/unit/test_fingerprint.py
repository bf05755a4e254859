"""Equal tokenizers have equal fingerprints, and every difference has its sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.fingerprint import differences, fingerprint, tokenizer_fingerprint
from tests.tiny_model import byte_tokenizer

SAME = fingerprint(
    vocab={"a": 0, "b": 1}, special_tokens={"</s>": 2}, eos_token_ids=[2, 1, 2], chat_template="{{x}}", vocab_size=8
)


def test_order_does_not_matter() -> None:
    other = fingerprint(
        vocab={"b": 1, "a": 0}, special_tokens={"</s>": 2}, eos_token_ids=(1, 2), chat_template="{{x}}", vocab_size=8
    )
    assert other == SAME
    assert differences(SAME, other) == []
    assert SAME.eos_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_sha256": "0"}, "their vocabularies map tokens to different ids"),
        ({"special_sha256": "0"}, "their special tokens differ"),
        ({"eos_token_ids": (3,)}, "the teacher ends a text at ids (3,), the student at (1, 2)"),
        ({"chat_template_sha256": ""}, "their chat templates differ"),
    ],
)
def test_every_difference_is_named_alone(change: dict[str, object], sentence: str) -> None:
    assert differences(replace(SAME, **change), SAME) == [sentence]


def test_models_of_one_family_may_pad_to_different_widths() -> None:
    assert differences(replace(SAME, vocab_size=9), SAME) == []


def test_no_template_is_no_hash() -> None:
    assert (
        fingerprint(
            vocab={}, special_tokens={}, eos_token_ids=(), chat_template=None, vocab_size=1
        ).chat_template_sha256
        == ""
    )


def test_a_real_tokenizer_changes_with_its_parts() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_fingerprint(tokenizer, eos_token_ids=[258], vocab_size=304)
    assert before == tokenizer_fingerprint(byte_tokenizer(), eos_token_ids=[258], vocab_size=304)
    tokenizer.chat_template = "other"
    assert differences(tokenizer_fingerprint(tokenizer, eos_token_ids=[258], vocab_size=304), before) == [
        "their chat templates differ"
    ]
    tokenizer.add_tokens(["new"])
    after = tokenizer_fingerprint(tokenizer, eos_token_ids=[258], vocab_size=304)
    assert "their vocabularies map tokens to different ids" in differences(after, before)
