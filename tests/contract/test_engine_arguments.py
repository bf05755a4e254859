"""What the engines refuse before they start."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from teacher_server.engines.transformers import TransformersEngine
from teacher_server.engines.vllm import VllmEngine
from teacher_server.engines.vllm_config import OWNED_ARGS


@pytest.mark.parametrize("name", sorted(OWNED_ARGS))
def test_an_argument_that_the_engine_owns_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        asyncio.run(VllmEngine.create("unused", engine_args={name: None}))


def test_speculative_decoding_is_refused(tiny_model: Path) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="speculative decoding is refused"):
        asyncio.run(VllmEngine.create(str(tiny_model), dtype="float32", engine_args={"speculative_config": ngram}))


def test_a_context_above_the_model_s_own_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"max_context_tokens is 257.*at most 256"):
        TransformersEngine(str(tiny_model), max_context_tokens=257)
