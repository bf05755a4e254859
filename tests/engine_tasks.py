"""An engine's tasks, and what its answers must be by a forward of the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protos.records import PAD_ID
from teacher_server.engines.base import Continuation, Engine, GenerateTask, ScoreRows, ScoreTask
from tests.reference import logprobs_TV, plain_model
from tests.tiny_model import VOCAB_SIZE

TOLERANCE = 1e-5
"""Nats: what batching, the prefix cache and another attention kernel may change in float32 on this model."""

CLEAR_GAP = 1e-4
"""Nats between two neighbours of a ranking above which their order must not depend on rounding."""


class Reference:
    """What a model itself says of a task."""

    def __init__(self, model_path: Path) -> None:
        self.model = plain_model(model_path)

    def logprobs_TV(self, task: ScoreTask) -> np.ndarray:
        """float64 [T, V]: log q(. | context, completion up to t) at the task's temperature."""
        return logprobs_TV(self.model, task.context_ids, task.completion_ids, task.temperature)

    def greedy(self, context_ids: np.ndarray, num_tokens: int) -> list[int]:
        text = context_ids.tolist()
        with torch.no_grad():
            for _ in range(num_tokens):
                text.append(int(self.model(torch.tensor([text])).logits[0, -1].argmax()))
        return text[len(context_ids) :]


def score_task(
    seed: int,
    num_context: int,
    num_completion: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    num_candidates: int = 0,
    entropy: bool = False,
) -> ScoreTask:
    """Random ids, padding rows of the vocabulary included; every third candidate is padding."""
    rng = np.random.default_rng(seed)
    candidate_ids = rng.integers(0, VOCAB_SIZE, (num_completion, num_candidates)).astype(np.int32)
    candidate_ids[:, 2::3] = PAD_ID
    return ScoreTask(
        context_ids=rng.integers(0, VOCAB_SIZE, num_context).astype(np.int32),
        completion_ids=rng.integers(0, VOCAB_SIZE, num_completion).astype(np.int32),
        temperature=temperature,
        top_k=top_k,
        candidate_ids=candidate_ids,
        entropy=entropy,
    )


async def scored_together(engine: Engine, tasks: Sequence[ScoreTask]) -> list[ScoreRows]:
    return await asyncio.gather(*(engine.score(task) for task in tasks))


def generate_task(context_ids: np.ndarray, **changes: Any) -> GenerateTask:
    plain = GenerateTask(
        context_ids,
        max_new_tokens=24,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        num_samples=1,
        seed=0,
        stop_token_ids=(),
    )
    return replace(plain, **changes)


def score_task_of(task: GenerateTask, token_ids: np.ndarray) -> ScoreTask:
    """The task that scores a sample at the temperature it was drawn at, a greedy one at 1."""
    no_candidates = np.empty((len(token_ids), 0), np.int32)
    return ScoreTask(task.context_ids, token_ids, task.temperature or 1.0, 0, no_candidates, entropy=False)


def assert_rows(rows: ScoreRows, task: ScoreTask, logprobs_TV: np.ndarray) -> None:
    """Every array of `rows` is that of the reference log-probs."""
    num_rows, every_row = len(task.completion_ids), np.arange(len(task.completion_ids))
    assert rows.sampled_logprobs.dtype == rows.top_logprobs.dtype == rows.candidate_logprobs.dtype == np.float32
    assert rows.top_ids.dtype == np.int32
    np.testing.assert_allclose(
        rows.sampled_logprobs, logprobs_TV[every_row, task.completion_ids], rtol=0, atol=TOLERANCE
    )

    assert rows.top_ids.shape == rows.top_logprobs.shape == (num_rows, task.top_k)
    order = np.argsort(-logprobs_TV, axis=1, kind="stable")
    ranked = np.take_along_axis(logprobs_TV, order, 1)
    np.testing.assert_allclose(rows.top_logprobs, ranked[:, : task.top_k], rtol=0, atol=TOLERANCE)
    gap = -np.diff(ranked, axis=1, prepend=np.inf, append=-np.inf)  # to the neighbour before; the last, to none
    clear = (gap[:, :-1] > CLEAR_GAP) & (gap[:, 1:] > CLEAR_GAP)
    assert np.array_equal(rows.top_ids[clear[:, : task.top_k]], order[:, : task.top_k][clear[:, : task.top_k]]), (
        "top ids differ where the ranking is clear"
    )

    assert rows.candidate_logprobs.shape == task.candidate_ids.shape
    wanted = np.take_along_axis(logprobs_TV, np.maximum(task.candidate_ids, 0), 1)
    wanted[task.candidate_ids == PAD_ID] = np.nan
    np.testing.assert_allclose(rows.candidate_logprobs, wanted, rtol=0, atol=TOLERANCE)

    if task.entropy:
        assert rows.entropy is not None
        np.testing.assert_allclose(rows.entropy, -(np.exp(logprobs_TV) * logprobs_TV).sum(1), rtol=0, atol=TOLERANCE)
    else:
        assert rows.entropy is None
    assert 0 <= rows.num_cached_tokens < len(task.context_ids) or rows.num_cached_tokens == 0


def assert_scored(tasks: Sequence[ScoreTask], results: Sequence[ScoreRows], reference: Reference) -> None:
    """Every task's rows are those of the reference."""
    for task, rows in zip(tasks, results, strict=True):
        assert_rows(rows, task, reference.logprobs_TV(task))


def assert_sample(reference: Reference, task: GenerateTask, sample: Continuation, *, atol: float = TOLERANCE) -> None:
    """The sample's log-probs are those of the whole distribution at the task's temperature."""
    assert sample.token_ids.dtype == np.int32
    assert sample.logprobs.dtype == np.float32
    ids_T = sample.token_ids
    expected_T = reference.logprobs_TV(score_task_of(task, ids_T))[np.arange(len(ids_T)), ids_T]
    np.testing.assert_allclose(sample.logprobs, expected_T, rtol=0, atol=atol)


def assert_within(reference: Reference, task: GenerateTask, token_ids: np.ndarray) -> None:
    """No id lies outside the top-k, nor outside the nucleus of what top-k leaves."""
    for logprobs_V, token_id in zip(reference.logprobs_TV(score_task_of(task, token_ids)), token_ids, strict=True):
        ranked = np.argsort(-logprobs_V)[: task.top_k or None]
        assert token_id in ranked
        kept = np.exp(logprobs_V[ranked]) / np.exp(logprobs_V[ranked]).sum()
        before = kept[: ranked.tolist().index(token_id)].sum()
        assert before < task.top_p + 1e-5
