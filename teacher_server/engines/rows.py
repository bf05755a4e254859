"""The rows of one task as tensor operations: logits in, one packed float32 array out; knows nothing of vLLM.

Shape letters as in protos.records, and R rows of logits, V vocabulary, W packed columns.

A packed row holds, in this order: the sampled log-prob, K top ids, K top log-probs, M candidate log-probs, and the
entropy when asked for. One array of one dtype crosses the process boundary without an object per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protos.records import PAD_ID, Float32
from teacher_server.engines.base import ScoreRows, ScoreTask
from teacher_server.engines.largest import largest

MAX_FLOAT32_ID = 2**24
"""Ids travel as float32 values, which hold every integer up to here exactly."""


@dataclass(frozen=True)
class RowsRequest:
    """What a task asks of the worker that holds the logits.

    Attributes:
        completion_ids: int64 [T].
        candidate_ids: int64 [T, M], PAD_ID pads; one row in memory where all are the same.
    """

    completion_ids: torch.Tensor
    candidate_ids: torch.Tensor
    top_k: int
    temperature: float
    entropy: bool

    @property
    def num_rows(self) -> int:
        """T, one row for each completion token."""
        return len(self.completion_ids)

    @property
    def width(self) -> int:
        """W, the columns of a packed row."""
        return 1 + 2 * self.top_k + self.candidate_ids.shape[1] + self.entropy

    @classmethod
    def from_plain(cls, plain: dict[str, Any], device: torch.device) -> RowsRequest:
        """The request that `to_plain` wrote, with its ids on `device`."""
        completion_ids = np.frombuffer(plain["completion_ids"], "<i4").astype(np.int64)
        candidate_ids = np.frombuffer(plain["candidate_ids"], "<i4").astype(np.int64).reshape(plain["candidates_shape"])
        return cls(
            completion_ids=torch.from_numpy(completion_ids).to(device),
            candidate_ids=torch.from_numpy(candidate_ids).to(device).expand(len(completion_ids), -1),
            top_k=plain["top_k"],
            temperature=plain["temperature"],
            entropy=plain["entropy"],
        )


def to_plain(task: ScoreTask) -> dict[str, Any]:
    """What `RowsRequest.from_plain` reads: plain values and little-endian int32 bytes, as MessagePack carries them."""
    return {
        "completion_ids": task.completion_ids.astype("<i4").tobytes(),
        "candidate_ids": task.candidate_ids.astype("<i4").tobytes(),
        "candidates_shape": list(task.candidate_ids.shape),
        "top_k": task.top_k,
        "temperature": float(task.temperature),
        "entropy": task.entropy,
    }


def score_rows(
    logits_RV: torch.Tensor,
    completion_ids_R: torch.Tensor,
    candidate_ids_RM: torch.Tensor,
    *,
    top_k: int,
    temperature: float,
    entropy: bool,
) -> torch.Tensor:
    """Packed rows float32 [R, W] under log_softmax(logits / temperature), in nats.

    log_softmax(x)_i = (x_i - max x) - log sum_j exp(x_j - max x): both terms on the right are one number a row, so the
    normaliser is applied to the gathered values only and no [R, V] array of log-probs is built.

    Args:
        logits_RV: any float dtype; computed in float32; -inf marks an impossible id.
        completion_ids_R, candidate_ids_RM: int64; a PAD_ID among the candidates gives NaN.
        top_k: K, at most V.
        temperature: above 0.
        entropy: whether the last column is the entropy.
    """
    assert logits_RV.shape[-1] <= MAX_FLOAT32_ID, f"ids of a vocabulary of {logits_RV.shape[-1]} do not fit float32"
    scaled_RV = logits_RV.to(torch.float32)
    if temperature != 1.0:
        scaled_RV = scaled_RV / temperature
    max_R1 = scaled_RV.amax(-1, keepdim=True)
    log_sum_R1 = (scaled_RV - max_R1).exp_().sum(-1, keepdim=True).log_()

    top_RK, top_ids_RK = largest(scaled_RV, top_k)
    candidates_RM = scaled_RV.gather(-1, candidate_ids_RM.clamp_min(0)).masked_fill(
        candidate_ids_RM == PAD_ID, float("nan")
    )
    columns = [
        scaled_RV.gather(-1, completion_ids_R.unsqueeze(-1)) - max_R1 - log_sum_R1,
        top_ids_RK.to(torch.float32),
        top_RK - max_R1 - log_sum_R1,
        candidates_RM - max_R1 - log_sum_R1,
    ]
    if entropy:
        columns.append(torch.special.entr(scaled_RV.softmax(-1)).sum(-1, keepdim=True))
    return torch.cat(columns, dim=-1)


def unpack_rows(packed_TW: Float32, task: ScoreTask, num_cached_tokens: int) -> ScoreRows:
    """The rows of a task from its packed array."""
    num_candidates = task.candidate_ids.shape[1]
    columns = 1 + 2 * task.top_k + num_candidates + task.entropy
    assert packed_TW.shape == (len(task.completion_ids), columns), f"{packed_TW.shape} for {columns} columns"
    sampled, top_ids, top_logprobs, candidates, entropy = np.split(
        packed_TW, np.cumsum([1, task.top_k, task.top_k, num_candidates]), axis=1
    )
    return ScoreRows(
        sampled_logprobs=np.ascontiguousarray(sampled[:, 0]),
        top_ids=top_ids.astype(np.int32),
        top_logprobs=np.ascontiguousarray(top_logprobs),
        candidate_logprobs=np.ascontiguousarray(candidates),
        entropy=np.ascontiguousarray(entropy[:, 0]) if task.entropy else None,
        num_cached_tokens=num_cached_tokens,
    )
