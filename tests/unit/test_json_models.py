"""Numbers that JSON has no words for."""

from __future__ import annotations

import json

import numpy as np

from protos.json_models import score_reply_to_json
from protos.records import ScoreResult


def test_nan_is_null_and_minus_infinity_is_a_word() -> None:
    row = np.array([[-0.5, np.nan, -np.inf]], np.float32)
    result = ScoreResult(row[0, :1], np.array([[1, 2, 3]], np.int32), row, row, row[0, 1:2], 0, 1, 0, 0.0, 0.0, 0)
    reply = json.loads(score_reply_to_json(0, result).model_dump_json())["result"]
    assert reply["sampled_logprobs"] == [-0.5]
    assert reply["top_logprobs"] == reply["candidate_logprobs"] == [[-0.5, None, "-Infinity"]]
    assert reply["entropy"] == [None]
