"""vLLM's JSON as arrays: what `/v1/completions` answers (vLLM 0.32.0, entrypoints.openai.completion.protocol)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from protos.records import PAD_ID, Float32, Int32, Sample

MINUS_INFINITY = -9999.0
"""What vLLM writes for -inf, which JSON lacks."""


def read_rows(rows: Sequence[Any], completion_ids: Int32, top_k: int) -> tuple[Float32, Int32, Float32]:
    """Sampled log-probs [T], top-K ids and log-probs [T, K] of vLLM's `prompt_logprobs` for the completion's positions.

    A row holds the K most likely ids, ranks 1 to K, and the completion's own id, whose rank is above K unless it is one
    of them.

    Raises:
        ValueError: a row is missing, or lacks its own id or one of the ranks.
    """
    num_tokens = len(completion_ids)
    if len(rows) != num_tokens:
        raise ValueError(f"{len(rows)} rows for {num_tokens} completion tokens")
    sampled_logprobs = np.empty(num_tokens, np.float32)
    top_ids = np.full((num_tokens, top_k), PAD_ID, np.int32)
    top_logprobs = np.empty((num_tokens, top_k), np.float32)
    for t, (row, own_id) in enumerate(zip(rows, completion_ids.tolist(), strict=True)):
        if str(own_id) not in row:
            raise ValueError(f"row {t} has no log-prob of the completion's own id {own_id}")
        sampled_logprobs[t] = row[str(own_id)]["logprob"]
        for token_id, entry in row.items():
            if entry["rank"] <= top_k:
                top_ids[t, entry["rank"] - 1] = int(token_id)
                top_logprobs[t, entry["rank"] - 1] = entry["logprob"]
    if (top_ids == PAD_ID).any():
        raise ValueError(f"a row has fewer than the {top_k} most likely ids")
    for logprobs in (sampled_logprobs, top_logprobs):
        logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return sampled_logprobs, top_ids, top_logprobs


def read_sample(choice: dict[str, Any]) -> Sample:
    """One choice that was asked for with `return_token_ids`; ValueError where it was cut short."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"the server ended a sample with {choice['finish_reason']!r}")
    logprobs = np.array(choice["logprobs"]["token_logprobs"], np.float32)
    return Sample(np.array(choice["token_ids"], np.int32), logprobs, choice["finish_reason"], choice["text"])
