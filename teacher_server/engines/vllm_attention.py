"""vLLM's attention on CPUs, batch-invariant in float32: a token's result is the same bits whatever shares its step.

The kernel reads keys and values a tile at a time, and the more query tokens a request has in a step, the shorter the
tiles: a completion whose prompt is cached, or a prompt cut by the step's token budget, had its sums taken in another
order. Of a request with no more query tokens than fill one iteration of the kernel every tile is of one length.

The model's other layers treat each token's row alone as they are; the products of LoRA adapters are not held to it.
What is relied on in vLLM 0.32.0 is pinned by tests/contract/test_vllm_seams_attention.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

HEADS_PER_ITERATION = 8
"""Query heads of one iteration of the kernel (MaxQHeadNumPerIteration in vLLM's csrc/cpu/cpu_attn_vec.hpp)."""


class InvariantMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, over requests cut into pieces of one iteration each."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """See CPUAttentionMetadataBuilder; half precisions, whose matrix products vary anyway, are left alone."""
        if self.dtype == torch.float32 and common_attn_metadata.causal is True:
            common_attn_metadata = in_pieces(common_attn_metadata, self._tokens_per_iteration)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    @property
    def _tokens_per_iteration(self) -> int:
        """The heads of a token that share keys are taken together where they fill an iteration, else one by one."""
        heads_per_kv = self.num_heads // self.num_kv_heads
        return HEADS_PER_ITERATION // heads_per_kv if HEADS_PER_ITERATION % heads_per_kv == 0 else HEADS_PER_ITERATION


@register_backend(AttentionBackendEnum.CPU_ATTN)
class InvariantAttentionBackend(CPUAttentionBackend):
    """What vLLM takes in the place of its own, once this module is imported."""

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """See AttentionBackend."""
        return InvariantMetadataBuilder


def in_pieces(metadata: CommonAttentionMetadata, num_tokens: int) -> CommonAttentionMetadata:
    """The same step as if each request's tokens came in several requests of at most `num_tokens`."""
    if metadata.max_query_len <= num_tokens:
        return metadata
    starts, ends = metadata.query_start_loc[:-1], metadata.query_start_loc[1:]
    num_pieces = (ends - starts + num_tokens - 1) // num_tokens
    request = torch.arange(len(starts)).repeat_interleave(num_pieces)
    nth = torch.arange(len(request)) - (num_pieces.cumsum(0) - num_pieces)[request]
    piece_ends = torch.minimum(starts[request] + (nth + 1) * num_tokens, ends[request]).to(torch.int32)
    return replace(
        metadata,
        num_reqs=len(request),
        max_query_len=num_tokens,
        query_start_loc=torch.cat([starts[:1], piece_ends]),
        seq_lens=metadata.seq_lens[request] - (ends[request] - piece_ends),
        block_table_tensor=metadata.block_table_tensor[request],
    )
