"""Records of which each test says only what it is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from protos.records import ScoreResult, TeacherInfo, TokenizerFingerprint

INFO = TeacherInfo(
    teachers=("base",),
    model="m",
    revision="",
    weights_version=0,
    tokenizer=TokenizerFingerprint(1, "", "", (), ""),
    max_context_tokens=1,
    max_top_k=1,
    max_candidates=1,
    max_items=1,
    supports=(),
    exact_temperature=True,
    prefix_cache=False,
    dtype="",
    engine="",
    engine_version="",
    score_path="",
    determinism="",
)


def score_result(sampled_logprobs: np.ndarray, **changes: Any) -> ScoreResult:
    """Of these log-probs [T] and of nothing else that could be asked for, unless `changes` say otherwise."""
    none_T0 = np.empty((len(sampled_logprobs), 0), np.float32)
    plain = ScoreResult(
        sampled_logprobs=sampled_logprobs.astype(np.float32),
        top_ids=none_T0.astype(np.int32),
        top_logprobs=none_T0,
        candidate_logprobs=none_T0,
        entropy=None,
        weights_version=0,
        num_context_tokens=1,
        num_cached_tokens=0,
        queue_s=0.0,
        engine_s=0.0,
        completion_crc32=0,
    )
    return replace(plain, **changes)
