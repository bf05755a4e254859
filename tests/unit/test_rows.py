"""The packed rows against torch's own log_softmax."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from protos.records import PAD_ID
from teacher_server.engines.base import ScoreTask
from teacher_server.engines.rows import RowsRequest, score_rows, to_plain, unpack_rows


def task_of(
    num_rows: int, vocab_size: int, *, top_k: int, num_candidates: int, temperature: float, entropy: bool
) -> ScoreTask:
    rng = np.random.default_rng(num_rows * 1000 + top_k)
    candidate_ids = rng.integers(0, vocab_size, (num_rows, num_candidates)).astype(np.int32)
    candidate_ids[:, 1::2] = PAD_ID
    return ScoreTask(
        context_ids=np.array([0], np.int32),
        completion_ids=rng.integers(0, vocab_size, num_rows).astype(np.int32),
        temperature=temperature,
        top_k=top_k,
        candidate_ids=candidate_ids,
        entropy=entropy,
    )


def score(logits_TV: torch.Tensor, task: ScoreTask) -> np.ndarray:
    request = RowsRequest.from_plain(to_plain(task), logits_TV.device)
    packed = score_rows(
        logits_TV,
        request.completion_ids,
        request.candidate_ids,
        top_k=request.top_k,
        temperature=request.temperature,
        entropy=request.entropy,
    )
    assert packed.shape == (request.num_rows, request.width)
    return packed.numpy()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 1.3, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_column_is_that_of_log_softmax(temperature: float, dtype: torch.dtype, offset: float) -> None:
    """In float64 as the truth; logits of +1000 lose 7 bits in float32 before we see them, so the truth rounds first."""
    task = task_of(9, 500, top_k=20, num_candidates=6, temperature=temperature, entropy=True)
    logits_TV = (torch.randn(9, 500, generator=torch.Generator().manual_seed(1)) * 4 + offset).to(dtype)
    rows = unpack_rows(score(logits_TV, task), task, num_cached_tokens=3)

    scaled_TV = (logits_TV.float() / temperature).double()
    truth_TV = torch.log_softmax(scaled_TV, dim=-1).numpy()
    # float32 has 24 bits: a log-prob of size |x| is known to about |x| * 2**-24, and one of size 300 to 2e-5.
    close = partial(np.testing.assert_allclose, rtol=3e-7, atol=2e-6)
    close(rows.sampled_logprobs, truth_TV[np.arange(9), task.completion_ids])
    close(rows.top_logprobs, -np.sort(-truth_TV, axis=1)[:, :20])
    close(np.take_along_axis(truth_TV, rows.top_ids, 1), rows.top_logprobs)
    wanted = np.take_along_axis(truth_TV, np.maximum(task.candidate_ids, 0), 1)
    wanted[task.candidate_ids == PAD_ID] = np.nan
    close(rows.candidate_logprobs, wanted)
    assert rows.entropy is not None
    close(rows.entropy, -(np.exp(truth_TV) * truth_TV).sum(1))
    assert rows.num_cached_tokens == 3


def test_a_temperature_of_one_half_is_not_one() -> None:
    """Logits (0, ln 3): p = (1/4, 3/4) at T = 1 and (1/10, 9/10) at T = 1/2, where the odds are squared."""
    logits_TV = torch.tensor([[0.0, np.log(3.0)]])
    task = task_of(1, 2, top_k=2, num_candidates=0, temperature=1.0, entropy=False)
    np.testing.assert_allclose(np.exp(unpack_rows(score(logits_TV, task), task, 0).top_logprobs), [[0.75, 0.25]], 1e-6)
    task = task_of(1, 2, top_k=2, num_candidates=0, temperature=0.5, entropy=False)
    np.testing.assert_allclose(np.exp(unpack_rows(score(logits_TV, task), task, 0).top_logprobs), [[0.9, 0.1]], 1e-6)


def test_only_what_was_asked_for_is_there() -> None:
    task = task_of(4, 10, top_k=0, num_candidates=0, temperature=1.0, entropy=False)
    packed = score(torch.randn(4, 10), task)
    assert packed.shape == (4, 1)  # the sampled log-prob alone
    rows = unpack_rows(packed, task, 0)
    assert rows.sampled_logprobs.shape == (4,)
    assert rows.top_ids.shape == rows.top_logprobs.shape == rows.candidate_logprobs.shape == (4, 0)
    assert rows.entropy is None


def test_an_impossible_id_has_no_probability_and_spoils_no_entropy() -> None:
    logits_TV = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    task = task_of(1, 4, top_k=4, num_candidates=0, temperature=0.7, entropy=True)
    rows = unpack_rows(score(logits_TV, task), task, 0)
    np.testing.assert_allclose(rows.top_logprobs, [[-np.log(2), -np.log(2), -np.inf, -np.inf]], rtol=1e-6)
    assert rows.entropy is not None
    np.testing.assert_allclose(rows.entropy, [np.log(2)], rtol=1e-6)  # two equal ids


def test_ids_of_a_real_vocabulary_survive_as_float32() -> None:
    """151,936 ids as in Qwen3: the last id is the most likely, and comes back as itself."""
    logits_TV = torch.zeros(1, 151_936)
    logits_TV[0, 151_935], logits_TV[0, 151_934] = 2.0, 1.0
    task = task_of(1, 151_936, top_k=2, num_candidates=0, temperature=1.0, entropy=False)
    assert unpack_rows(score(logits_TV, task), task, 0).top_ids.tolist() == [[151_935, 151_934]]


def test_the_logits_are_not_changed() -> None:
    """At T = 1 the float32 logits are not copied, so an in-place operation would show here."""
    logits_TV = torch.randn(3, 50)
    before_TV = logits_TV.clone()
    for temperature in (1.0, 0.5):
        score(logits_TV, task_of(3, 50, top_k=5, num_candidates=2, temperature=temperature, entropy=True))
    assert torch.equal(logits_TV, before_TV)


def test_a_task_crosses_the_process_boundary_unchanged() -> None:
    task = task_of(7, 300, top_k=3, num_candidates=4, temperature=0.7, entropy=True)
    request = RowsRequest.from_plain(to_plain(task), torch.device("cpu"))
    assert request.completion_ids.tolist() == task.completion_ids.tolist()
    assert request.candidate_ids.tolist() == task.candidate_ids.tolist()
    assert (request.top_k, request.temperature, request.entropy) == (3, 0.7, True)
    assert request.width == 1 + 3 + 3 + 4 + 1
    shared = replace(task, candidate_ids=task.candidate_ids[:1])
    assert (
        RowsRequest.from_plain(to_plain(shared), torch.device("cpu")).candidate_ids.tolist()
        == [task.candidate_ids[0].tolist()] * 7
    )
