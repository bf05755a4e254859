"""vLLM's prompt_logprobs, row by row: the completion's own id apart from the K most likely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos._openai_rows import read_rows


def row(*entries: tuple[int, int, float]) -> dict[str, Any]:
    return {str(token_id): {"rank": rank, "logprob": logprob} for token_id, rank, logprob in entries}


def test_an_own_id_beyond_the_top_k_is_not_one_of_them() -> None:
    # Own id 9 comes first in vLLM's mapping and has rank 5; ids 4 and 7 are the two most likely.
    sampled, top_ids, top_logprobs = read_rows([row((9, 5, -6.0), (4, 1, -0.5), (7, 2, -1.0))], np.array([9]), 2)
    assert sampled.tolist() == [-6.0]
    assert top_ids.tolist() == [[4, 7]]
    assert top_logprobs.tolist() == [[-0.5, -1.0]]


def test_an_own_id_within_the_top_k_is_both() -> None:
    sampled, top_ids, top_logprobs = read_rows([row((7, 2, -1.0), (4, 1, -0.5))], np.array([7]), 2)
    assert sampled.tolist() == [-1.0]
    assert top_ids.tolist() == [[4, 7]]
    assert top_logprobs.tolist() == [[-0.5, -1.0]]


def test_an_own_id_that_ties_with_the_last_of_the_top_k_is_not_one_of_them() -> None:
    # vLLM counts the values at least as large: 7, 8 and 9 tie, so own id 9 has rank 4, and 7 and 8 have ranks 2 and 3.
    rows = [row((9, 4, -1.0), (4, 1, -0.5), (7, 2, -1.0), (8, 3, -1.0))]
    _, top_ids, _ = read_rows(rows, np.array([9]), 3)
    assert top_ids.tolist() == [[4, 7, 8]]


def test_what_json_cannot_say_is_read_back() -> None:
    # vLLM writes -9999.0 for -inf.
    sampled, _, top_logprobs = read_rows([row((9, 3, -9999.0), (4, 1, 0.0), (7, 2, -9999.0))], np.array([9]), 2)
    assert sampled.tolist() == [-np.inf]
    assert top_logprobs.tolist() == [[0.0, -np.inf]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "0 rows for 1"),
        ([row((4, 1, -0.5), (7, 2, -1.0))], "own id 9"),
        ([row((9, 5, -6.0), (4, 1, -0.5))], "fewer than the 2"),
    ],
)
def test_a_reply_that_lacks_something_is_refused(rows: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_rows(rows, np.array([9]), 2)
