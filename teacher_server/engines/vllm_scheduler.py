"""The scheduler's half of scoring inside vLLM: the prefix cache is read up to the first wanted row and no further.

Runs in vLLM's engine core; `VllmEngine` names a class by import path. What it relies on in vLLM 0.32.0 (pinned by
tests/contract/test_vllm_seams.py): `Scheduler._get_local_prefix_cache_hit` is asked once for each new request, and
`KVCacheManager.truncate_computed_blocks` shortens its answer at a multiple of the block size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from teacher_server.engines.vllm_worker import EXTRA_ARG

if TYPE_CHECKING:
    from vllm.v1.request import Request

    _Scheduler = Scheduler
else:
    _Scheduler = object


class _ReadsUpToFirstRow(_Scheduler):
    """A mixin over vLLM's scheduler: a position whose hidden state is wanted is never taken from the prefix cache.

    Without it a group of completions of one prompt hides its own first rows: the prompt's last token, whose row
    predicts the first completion token, lies in a cached block as soon as the prompt fills its blocks.
    """

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        hit = blocks, num_tokens, shared_boundary, is_divergent = super()._get_local_prefix_cache_hit(request)
        first = _first_wanted_position(request)
        if first is None or num_tokens <= first:
            return hit
        num_kept = first - first % self.block_size
        return (
            self.kv_cache_manager.truncate_computed_blocks(blocks, num_kept),
            num_kept,
            min(shared_boundary, num_kept),
            is_divergent,
        )


def _first_wanted_position(request: Request) -> int | None:
    """Of the prompt's C + T - 1 positions the last T are wanted; None where no rows are."""
    params = request.sampling_params
    if params is None or not params.extra_args or EXTRA_ARG not in params.extra_args:
        return None
    num_rows = len(params.extra_args[EXTRA_ARG]["completion_ids"]) // np.dtype(np.int32).itemsize
    return request.num_prompt_tokens - num_rows


class ScoringScheduler(_ReadsUpToFirstRow, Scheduler):
    """vLLM's synchronous scheduler, made for scoring."""


class AsyncScoringScheduler(_ReadsUpToFirstRow, AsyncScheduler):
    """vLLM's asynchronous scheduler, made for scoring."""
