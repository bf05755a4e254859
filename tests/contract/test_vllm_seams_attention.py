"""Every part of vLLM that log-probs equal to the bit rely on, on a CPU in float32: see vllm_attention."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from teacher_server.engines.vllm_attention import InvariantAttentionBackend, InvariantMetadataBuilder, in_pieces
from teacher_server.engines.vllm_config import ENVIRONMENT
from tests.contract.test_vllm_seams import source

if current_platform.is_cpu():
    current_platform.import_kernels()

on_a_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="these are the kernels of vLLM for CPUs")


def step(query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor) -> CommonAttentionMetadata:
    """As vLLM's model runner describes it: the last `query_lens` tokens of texts of `seq_lens` so far."""
    starts = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=block_table,
        slot_mapping=torch.empty(0),
    )


def test_requests_are_cut_into_pieces() -> None:
    """Five tokens of a text of 9 and one of a text of 4, two tokens a piece."""
    cut = in_pieces(step([5, 1], [9, 4], torch.tensor([[7], [8]])), 2)
    assert cut.query_start_loc.tolist() == [0, 2, 4, 5, 6]
    assert cut.seq_lens.tolist() == [6, 8, 9, 4]
    assert cut.block_table_tensor.tolist() == [[7], [7], [7], [8]]
    assert (cut.num_reqs, cut.max_query_len) == (4, 2)
    whole = step([1, 1], [9, 4], torch.tensor([[7], [8]]))
    assert in_pieces(whole, 1) is whole


@on_a_cpu
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 2)])
def test_attention_on_a_cpu_is_the_same_bits_whatever_the_step(num_heads: int, num_kv_heads: int) -> None:
    """The last tokens of a text of 1,500: with all of it, or with its first part in the cache, beside other texts."""
    generator = torch.Generator().manual_seed(0)
    dim, block_size, length = 128, 32, 1500
    blocks = torch.randn(64, num_kv_heads, 2 * block_size, dim, generator=generator)
    keys, values = blocks.chunk(2, dim=2)
    query = torch.randn(length, num_heads, dim, generator=generator)
    builder: Any = object.__new__(InvariantMetadataBuilder)
    builder.num_heads, builder.num_kv_heads, builder.head_dim, builder.window_size = num_heads, num_kv_heads, dim, -1
    builder.dtype, builder.block_size, builder.kv_cache_dtype = torch.float32, block_size, "auto"
    builder.isa = cpu_attn._get_attn_isa(torch.float32, block_size, dim)
    builder.is_cross_attention = builder.is_encoder_only_attention = False

    def attention(*query_lens: int) -> list[torch.Tensor]:
        """Of the text's last tokens, for each of the `query_lens`."""
        table = torch.arange(64, dtype=torch.int32).expand(len(query_lens), -1)
        metadata = builder.build(0, step([*query_lens], [length] * len(query_lens), table))
        output = torch.empty(sum(query_lens), num_heads, dim)
        ops.cpu_attention_with_kv_cache(
            query=torch.cat([query[-n:] for n in query_lens]),
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=metadata.query_start_loc,
            seq_lens=metadata.seq_lens,
            scale=dim**-0.5,
            causal=metadata.causal,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=metadata.block_table,
            softcap=0.0,
            scheduler_metadata=metadata.scheduler_metadata,
            s_aux=None,
        )
        return list(output.split([*query_lens]))

    (whole,) = attention(length)
    for tail in (*attention(1, 100), *attention(101, 7, 640)):
        assert torch.equal(tail, whole[-len(tail) :])


@on_a_cpu
@pytest.mark.parametrize(("num_in", "num_out"), [(576, 960), (1536, 576), (64, 304)])
def test_matrix_products_on_a_cpu_are_the_same_bits_whatever_the_step(num_in: int, num_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, num_in, generator=generator)
    handler = ops.create_onednn_mm(torch.randn(num_out, num_in, generator=generator).t(), 32)
    whole = ops.onednn_mm(handler, rows, None)
    for first, last in ((0, 1), (7, 9), (100, 201), (40, 300)):
        assert torch.equal(ops.onednn_mm(handler, rows[first:last], None), whole[first:last])


@on_a_cpu
def test_vllm_takes_our_attention_for_its_own() -> None:
    assert AttentionBackendEnum.CPU_ATTN.get_class() is InvariantAttentionBackend
    assert "AttentionBackendEnum.CPU_ATTN.get_path()" in source(type(current_platform).get_attn_backend_cls)
    assert "enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV" in source(cpu_attn.CPUAttentionMetadataBuilder.build)
    assert ENVIRONMENT["VLLM_CPU_ATTN_SPLIT_KV"] == "0"
