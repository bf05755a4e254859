"""Scores of a real model, from real servers, against log_softmax(logits / T) of a float32 forward here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protos.records import Chat, Message, ScoreItem, ScoreResult, SystemText
from tests.harness import LoopThread, Server, server_of
from tests.reference import logprobs_TV, plain_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ATOL = 1e-4
"""Nats, between float32 forwards that sum in another order over thirty layers."""

QUESTION = Message("user", "Why is the sky blue?")
RULE = "You are a sailor. Answer in rhymes."
ANSWER = (
    "The sky is blue because air scatters short wavelengths more strongly than long ones: blue light arrives from "
    "every direction, red light from the sun alone. At dusk the path is longer, and the blue is scattered away."
)


class Reference:
    """The model and its tokenizer, in this process."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.model = plain_model(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.completion = np.array(self.tokenizer(ANSWER).input_ids, np.int32)

    def context(self, *messages: Message) -> np.ndarray:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return np.array(self.tokenizer(text, add_special_tokens=False).input_ids, np.int32)

    def rows(self, context: np.ndarray, temperature: float) -> np.ndarray:
        return logprobs_TV(self.model, context, self.completion, temperature)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(request: pytest.FixtureRequest, run: LoopThread, smollm2: Path) -> Iterator[Server]:
    with server_of(run, smollm2, request.param) as server:
        yield server


def score(run: LoopThread, server: Server, scheme: str, item: ScoreItem) -> ScoreResult:
    async def call() -> ScoreResult:
        async with server.connect(scheme) as teacher:
            [result] = await teacher.score([item])
            return result

    return run(call())


def check(result: ScoreResult, rows_TV: np.ndarray, completion: np.ndarray, candidates_TM: np.ndarray) -> None:
    """Every array of the result against the reference rows; ids wherever the next candidate is not within ATOL."""
    num_tokens, top_k = result.top_ids.shape
    np.testing.assert_allclose(result.sampled_logprobs, rows_TV[np.arange(num_tokens), completion], rtol=0, atol=ATOL)
    order_TV = np.argsort(-rows_TV, axis=1)
    sorted_TV = np.take_along_axis(rows_TV, order_TV, 1)
    gap_after_TK = sorted_TV[:, :top_k] - sorted_TV[:, 1 : top_k + 1]
    gap_before_TK = np.pad(gap_after_TK[:, :-1], ((0, 0), (1, 0)), constant_values=np.inf)
    is_clear_TK = (gap_after_TK > ATOL) & (gap_before_TK > ATOL)
    assert is_clear_TK.mean() > 0.9
    np.testing.assert_array_equal(result.top_ids[is_clear_TK], order_TV[:, :top_k][is_clear_TK])
    np.testing.assert_allclose(result.top_logprobs, sorted_TV[:, :top_k], rtol=0, atol=ATOL)
    expected_TM = np.take_along_axis(rows_TV, np.maximum(candidates_TM, 0), 1)
    expected_TM[candidates_TM < 0] = np.nan
    np.testing.assert_allclose(result.candidate_logprobs, expected_TM, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 1), (0.7, 20), (1.0, 64), (1.3, 20)])
def test_scores_are_those_of_log_softmax(run, server, reference, scheme, temperature, top_k) -> None:
    context = reference.context(QUESTION)
    candidates = np.random.default_rng(0).integers(0, 49_152, (len(reference.completion), 7)).astype(np.int32)
    candidates[::3, 5:] = -1
    item = ScoreItem(context, reference.completion, temperature, top_k, candidates)
    result = score(run, server, scheme, item)
    rows_TV = reference.rows(context, temperature)
    check(result, rows_TV, reference.completion, candidates)
    with pytest.raises(AssertionError):  # the comparison sees a shift of one position
        check(result, np.roll(rows_TV, 1, axis=0), reference.completion, candidates)


def test_privileged_text_changes_the_scores_to_those_of_the_told_model(run, server, reference, scheme) -> None:
    """The system message replaces the default one of SmolLM2's template, as the template itself would do."""
    item = ScoreItem(Chat((QUESTION,)), reference.completion, privileged=SystemText(RULE))
    told = score(run, server, scheme, item).sampled_logprobs
    rows_TV = reference.rows(reference.context(Message("system", RULE), QUESTION), 1.0)
    index = np.arange(len(reference.completion))
    np.testing.assert_allclose(told, rows_TV[index, reference.completion], rtol=0, atol=ATOL)
    plain = reference.rows(reference.context(QUESTION), 1.0)[index, reference.completion]
    assert np.abs(told - plain).mean() > 0.05
