"""The two ways to ask vLLM for rows: what each sends, and reads in the answer."""

# ruff: noqa: E402  (nothing of vLLM may be imported where it is not installed)
from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any

import numpy as np
import pytest

vllm = pytest.importorskip("vllm")

import torch
from vllm import RequestOutput
from vllm.logprobs import FlatLogprobs

from protos.records import PAD_ID
from teacher_server.engines.base import ScoreTask
from teacher_server.engines.vllm import VllmEngine
from teacher_server.engines.vllm_paths import OfficialFields, RunnerRows
from tests.tiny_model import build_tiny_qwen3


def score_task(*, temperature: float = 1.0, top_k: int = 2, entropy: bool = False) -> ScoreTask:
    return ScoreTask(
        context_ids=np.array([5, 6, 7], np.int32),
        completion_ids=np.array([8, 9], np.int32),
        temperature=temperature,
        top_k=top_k,
        candidate_ids=np.array([[1, PAD_ID], [2, 3]], np.int32),
        entropy=entropy,
    )


def test_runner_rows_send_all_but_the_last_id() -> None:
    prompt_ids, params = RunnerRows().request(score_task(temperature=0.7), read_prefix_cache=True)
    assert prompt_ids == [5, 6, 7, 8]  # position 2 predicts 8, position 3 predicts 9
    assert params.max_tokens == 1


def test_official_fields_ask_for_the_completion_and_the_candidates() -> None:
    prompt_ids, params = OfficialFields().request(score_task(), read_prefix_cache=True)
    assert prompt_ids == [5, 6, 7, 8, 9]
    assert params.prompt_logprob_start == 2  # the row that predicts the first completion token
    assert params.prompt_logprob_token_ids is not None
    assert params.prompt_logprob_token_ids.tolist() == [[8, 1, PAD_ID], [9, 2, 3]]
    assert params.skip_reading_prefix_cache  # a top-K needs every row of the prompt
    _, params = OfficialFields().request(score_task(top_k=0), read_prefix_cache=True)
    assert (params.prompt_logprobs, params.skip_reading_prefix_cache) == (None, False)


def test_official_fields_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0\.7"):
        OfficialFields().request(score_task(temperature=0.7), read_prefix_cache=True)
    with pytest.raises(ValueError, match="entropy"):
        OfficialFields().request(score_task(entropy=True), read_prefix_cache=True)


def test_official_fields_are_read_from_the_end_of_the_prompt() -> None:
    """A prompt of five tokens has four rows; the last two are the completion's, each led by its own token."""
    flat = FlatLogprobs()
    flat.append(None)
    for row, (own, first, second) in enumerate([(6, 1, 2), (7, 1, 2), (8, 4, 8), (9, 9, 4)]):
        flat.append_fast([own, first, second], [-3.0 - row, -1.0 - row, -2.0 - row], chain([3, 1, 2]), [None] * 3)
    output = RequestOutput(
        request_id="0",
        prompt=None,
        prompt_token_ids=[5, 6, 7, 8, 9],
        prompt_logprobs=flat,
        outputs=[],
        finished=True,
        prompt_token_id_logprobs=np.array([[-5.0, -1.5, -np.inf], [-6.0, -2.5, -3.5]], np.float32),
    )
    rows = OfficialFields().rows(score_task(), output)
    assert rows is not None
    assert rows.sampled_logprobs.tolist() == [-5.0, -6.0]
    assert rows.top_ids.tolist() == [[4, 8], [9, 4]]
    assert rows.top_logprobs.tolist() == [[-3.0, -4.0], [-4.0, -5.0]]
    np.testing.assert_array_equal(rows.candidate_logprobs, [[-1.5, np.nan], [-2.5, -3.5]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the V2 model runner needs a CUDA device")
def test_official_fields_equal_runner_rows(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same task through both model runners of one GPU build."""

    model = str(build_tiny_qwen3(tmp_path))

    async def score(use_v2: str) -> Any:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
        engine = await VllmEngine.create(model, dtype="float32", kv_cache_gib=1.0)
        rows = await engine.score(score_task())
        await engine.close()
        return engine.info.score_path, rows

    path, expected = asyncio.run(score("0"))
    assert path == "runner-rows"
    path, rows = asyncio.run(score("1"))
    assert path == "official-fields"
    for name in ("sampled_logprobs", "top_logprobs", "candidate_logprobs"):
        np.testing.assert_allclose(getattr(rows, name), getattr(expected, name), rtol=0, atol=1e-4)
    assert rows.top_ids.tolist() == expected.top_ids.tolist()


def test_a_request_says_whether_it_reads_the_prefix_cache() -> None:
    for read_prefix_cache in (True, False):
        _, params = RunnerRows().request(score_task(), read_prefix_cache=read_prefix_cache)
        assert params.skip_reading_prefix_cache is not read_prefix_cache
        assert params.prompt_logprobs is None  # which would make vLLM skip the cache by itself
