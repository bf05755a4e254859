"""The scheduler's half of scoring inside vLLM: the prefix cache is read up to the first wanted row and no further.

Runs in vLLM's engine core; `VllmEngine` names a class by import path. What it relies on in vLLM 0.32.0 (pinned by
tests/contract/test_vllm_seams.py): `Scheduler._get_local_prefix_cache_hit` is asked once for each new request,
`KVCacheManager.truncate_computed_blocks` shortens its answer at a multiple of the block size, and
`_has_partial_local_hit` says whether a hit that ends inside a block needs a copy of that block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

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

    Where every layer attends to all of the text, that token alone is computed again, not its whole block. Its keys and
    values are written over those of the shared block, which they equal to rounding, as vLLM does itself with the last
    token of a prompt that another machine prefilled (`Scheduler._update_waiting_for_remote_kv`). vLLM's own answer to a
    hit inside a block, a private copy made before the step, cannot serve here: the members of a group mostly come in
    one step, in which the block to copy is not computed yet.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager, *others = self.kv_cache_manager.coordinator.single_type_managers
        # Where hashes are finer than blocks, vLLM itself finds hits inside blocks that go on with other tokens: those
        # need their copy.
        is_plain = not others and self.connector is None and type(manager) is FullAttentionManager
        self._reads_into_blocks = is_plain and manager.block_pool.hash_block_size == manager.block_size
        if self._reads_into_blocks:
            manager._has_partial_local_hit = _needs_no_copy

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        hit = blocks, num_tokens, shared_boundary, is_divergent = super()._get_local_prefix_cache_hit(request)
        first = _first_wanted_position(request)
        if first is None or num_tokens <= first:
            return hit
        whole = first - first % self.block_size
        num_read, end = (
            (first, whole + self.block_size) if self._reads_into_blocks and first > whole else (whole, whole)
        )
        return (
            self.kv_cache_manager.truncate_computed_blocks(blocks, end),
            num_read,
            min(shared_boundary, whole),
            is_divergent,
        )


def _needs_no_copy(new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int) -> bool:
    """In the place of `FullAttentionManager._has_partial_local_hit`."""
    return False


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
