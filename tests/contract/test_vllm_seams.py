"""Every part of vLLM that scoring relies on and vLLM does not promise: another vLLM fails here, with the reason."""

# ruff: noqa: E402  (nothing of vLLM may be imported where it is not installed)
from __future__ import annotations

import asyncio
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

vllm = pytest.importorskip("vllm")

import torch
from vllm import RequestOutput, SamplingParams
from vllm.config import CacheConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import BackgroundResources, MPClient
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.sampler import Sampler
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput, GPUModelRunner

from teacher_server.engines.base import ScoreRows
from teacher_server.engines.rows import RowsRequest, to_plain
from teacher_server.engines.vllm import VllmEngine
from teacher_server.engines.vllm_config import (
    ASYNC_SCORING_SCHEDULER,
    ENVIRONMENT,
    OWNED_ARGS,
    SCORING_SCHEDULER,
    SCORING_WORKER,
)
from teacher_server.engines.vllm_paths import RunnerRows
from teacher_server.engines.vllm_scheduler import _needs_no_copy, _ReadsUpToFirstRow
from teacher_server.engines.vllm_worker import EXTRA_ARG, RowScoring, ScoringWorker
from tests.engine_tasks import score_task
from tests.tiny_model import build_tiny_qwen3


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def source(function: object) -> str:
    return inspect.getsource(function)  # type: ignore[arg-type]


def test_the_version_is_the_one_the_seams_were_read_in() -> None:
    assert vllm.__version__.startswith("0.32."), (
        f"vLLM is {vllm.__version__}; the row scoring of vllm_worker.py was checked against 0.32: read its seams again "
        "(this file names them), then change this line and the bounds in pyproject.toml"
    )


def test_the_runner_asks_for_prompt_rows_once_a_step() -> None:
    """`RowScoring` overrides this method, and finds the step's rows as vLLM's own version does."""
    assert parameters(GPUModelRunner._get_prompt_logprobs_dict) == ["self", "hidden_states", "num_scheduled_tokens"]
    own = source(GPUModelRunner._get_prompt_logprobs_dict)
    for relied_on in (
        "request = self.requests[req_id]",
        "request.prompt_token_ids",
        "start_idx = request.num_computed_tokens",
        "req_idx = self.input_batch.req_id_to_index[req_id]",
        "offset = self.query_start_loc.np[req_idx].item()",
        "self.model.compute_logits(prompt_hidden_states)",
    ):
        assert relied_on in own, f"vLLM's own prompt rows no longer use `{relied_on}`: RowScoring._score_chunk does"
    caller = source(GPUModelRunner._bookkeeping_sync)
    assert caller.count("self._get_prompt_logprobs_dict(") == 1
    assert "hidden_states[:num_scheduled_tokens]" in caller


def test_the_runner_builds_one_output_a_step() -> None:
    """`RowScoring.sample_tokens` puts its rows in that output, or in the one an asynchronous output wraps."""
    assert parameters(GPUModelRunner.sample_tokens) == ["self", "grammar_output"]
    assert "self._bookkeeping_sync(" in source(GPUModelRunner.sample_tokens)
    assert "self._model_runner_output = model_runner_output" in source(AsyncGPUModelRunnerOutput.__init__)
    assert "return output" in source(AsyncGPUModelRunnerOutput.get_output)
    field = {f.name: f for f in dataclasses.fields(ModelRunnerOutput)}["prompt_token_id_logprobs_dict"]
    assert field.default_factory is dict


def test_the_rows_travel_untouched_to_the_request_output() -> None:
    """Model runner -> scheduler -> front end: one tensor, no object per token."""
    assert "prompt_token_id_logprobs=prompt_token_id_logprobs" in source(Scheduler.update_from_output)
    assert "prompt_token_id_logprobs" in EngineCoreOutput.__struct_fields__
    assert "prompt_token_id_logprobs" in parameters(RequestOutput.__init__)
    processor = LogprobsProcessor(None, None, None, None, None, None)
    rows = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    output = EngineCoreOutput(request_id="0", new_token_ids=[1], prompt_token_id_logprobs=rows)
    frames = [bytearray(cast("bytes", frame)) for frame in MsgpackEncoder().encode(output)]
    received = MsgpackDecoder(EngineCoreOutput).decode(frames)
    processor.update_from_output(received)
    assert processor.prompt_token_id_logprobs is not None
    assert processor.prompt_token_id_logprobs.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_the_request_travels_untouched_to_the_worker() -> None:
    """`extra_args` passes MessagePack to the engine core, and pickle from there to the workers of other processes."""
    task = score_task(0, 3, 2, top_k=2, num_candidates=2)
    _, params = RunnerRows().request(task, read_prefix_cache=True)
    received = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    received = pickle.loads(pickle.dumps(received))
    assert received.extra_args == {EXTRA_ARG: to_plain(task)}
    request = RowsRequest.from_plain(received.extra_args[EXTRA_ARG], torch.device("cpu"))
    assert request.completion_ids.tolist() == task.completion_ids.tolist()


def test_request_state_is_what_the_runner_keeps() -> None:
    fields = {f.name for f in dataclasses.fields(CachedRequestState)}
    assert {"prompt_token_ids", "num_computed_tokens", "sampling_params"} <= fields
    assert parameters(GPUModelRunner._on_request_state_removed) == ["self", "req_id", "req_state"]
    assert "self._on_request_state_removed(req_id, req_state)" in source(GPUModelRunner._update_states)


def test_an_unfinished_prefill_is_sampled_and_rewound() -> None:
    """Why `RowScoring` sets generators aside: the rewind, which a CPU generator refuses."""
    assert "gen.set_offset(gen.get_offset() - 4)" in source(GPUModelRunner._bookkeeping_sync), (
        "vLLM no longer rewinds generators: RowScoring._seeds_of_unfinished_prefills_set_aside may not be needed"
    )
    assert "self.discard_request_mask.np[:num_reqs]" in source(GPUModelRunner._bookkeeping_sync)
    assert "self.generators: dict[int, torch.Generator] = {}" in source(InputBatch.__init__)
    assert "generators=self.generators" in source(InputBatch._make_sampling_metadata)


def test_the_worker_is_named_by_path_and_builds_its_runner_in_init_device() -> None:
    assert f"{ScoringWorker.__module__}.{ScoringWorker.__qualname__}" == SCORING_WORKER
    assert "worker_cls" in {f.name for f in dataclasses.fields(AsyncEngineArgs)}
    base = ScoringWorker.__mro__[1]
    assert base.__name__ == ("CPUWorker" if current_platform.is_cpu() else "Worker")
    assert "model_runner" in source(base.init_device)


def test_the_mixin_overrides_methods_that_exist() -> None:
    overridden = {name for name, value in vars(RowScoring).items() if inspect.isfunction(value)}
    own = {"install", "_score_chunk", "_seeds_of_unfinished_prefills_set_aside"}
    assert overridden - own == {
        "_get_prompt_logprobs_dict",
        "sample_tokens",
        "_on_request_state_removed",
        "load_lora_model",
    }
    assert all(hasattr(GPUModelRunner, name) for name in overridden - own)


def test_the_scheduler_is_named_by_path_and_asks_for_the_prefix_once() -> None:
    for path, base in ((SCORING_SCHEDULER, Scheduler), (ASYNC_SCORING_SCHEDULER, AsyncScheduler)):
        assert issubclass(cast("type", resolve_obj_by_qualname(path)), base)
        assert "_get_local_prefix_cache_hit" not in vars(AsyncScheduler)
    assert source(Scheduler.schedule).count("self._get_local_prefix_cache_hit(request)") == 1
    assert parameters(Scheduler._get_local_prefix_cache_hit) == ["self", "request"]
    assert parameters(KVCacheManager.truncate_computed_blocks) == ["self", "blocks", "num_computed_tokens"]
    # Two places ask whether a hit that ends inside a block needs a copy: the count of blocks, and the hit's taking.
    names = ["new_computed_blocks", "num_local_computed_tokens"]
    assert parameters(FullAttentionManager._has_partial_local_hit) == ["self", *names]
    assert parameters(_needs_no_copy) == names
    asked = source(inspect.getmodule(FullAttentionManager)).count(
        "self._has_partial_local_hit(new_computed_blocks, num"
    )
    assert asked == 2


def test_a_lone_group_has_hashes_of_the_size_of_its_blocks() -> None:
    """So that vLLM finds whole blocks alone, and none that goes on with another text's tokens."""
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    caches = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    finer = VllmConfig(cache_config=CacheConfig(block_size=32, prefix_match_unit=16))
    with pytest.raises(ValueError, match=r"with a single KV cache group, .* Unset it or set it to 32\."):
        resolve_kv_cache_block_sizes(caches, finer)


@pytest.mark.parametrize(
    ("num_groups", "hash_block_size", "connector", "in_place"),
    [(1, 32, None, True), (1, 16, None, False), (1, 32, "any", False), (2, 32, None, False)],
)
def test_a_block_is_read_in_place_where_no_hit_ends_inside_another_text_s(
    num_groups: int, hash_block_size: int, connector: str | None, in_place: bool
) -> None:
    """Elsewhere vLLM's own answer stands: a hit that ends inside a block needs a copy of it."""
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    pool = BlockPool(8, enable_caching=True, hash_block_size=hash_block_size)
    managers = [FullAttentionManager(spec, pool, True, group, scheduler_block_size=32) for group in range(num_groups)]

    class OverManagers:
        def __init__(self) -> None:
            coordinator = SimpleNamespace(single_type_managers=managers)
            self.kv_cache_manager, self.connector = SimpleNamespace(coordinator=coordinator), connector

    class Reading(_ReadsUpToFirstRow, OverManagers):
        """The mixin over as much of a scheduler as it looks at."""

    assert Reading()._reads_into_blocks is in_place
    block = pool.blocks[1]
    assert [manager._has_partial_local_hit([block], 33) for manager in managers] == [not in_place] * num_groups


def test_rows_that_the_prefix_cache_hides_are_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vLLM's own scheduler a context of whole blocks hides its last position, so that path is still taken."""
    ours = "teacher_server.engines.vllm_config"
    monkeypatch.setattr(f"{ours}.SCORING_SCHEDULER", "vllm.v1.core.sched.scheduler.Scheduler")
    monkeypatch.setattr(f"{ours}.ASYNC_SCORING_SCHEDULER", "vllm.v1.core.sched.async_scheduler.AsyncScheduler")
    task = score_task(0, 64, 40, top_k=2)

    async def score_twice() -> tuple[list[ScoreRows], list[int]]:
        engine_args = {"block_size": 32}
        model = build_tiny_qwen3(tmp_path)
        engine = await VllmEngine.create(str(model), dtype="float32", kv_cache_gib=0.25, engine_args=engine_args)
        try:
            ids, results = [next(engine._request_ids)], []
            for _ in range(2):
                results.append(await engine.score(task))
                ids.append(next(engine._request_ids))
            return results, ids
        finally:
            await engine.close()

    (first, again), ids = asyncio.run(score_twice())
    # Each look takes an id itself. The first score sent request 1; the second sent 3, whose rows were hidden, and 4.
    assert ids == [0, 2, 5]
    np.testing.assert_allclose(again.top_logprobs, first.top_logprobs, rtol=0, atol=1e-5)
    assert again.num_cached_tokens == 0


def test_arguments_and_switches_still_have_their_names() -> None:
    fields = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
    assert fields >= OWNED_ARGS
    assert {"kv_cache_memory_bytes", "max_num_batched_tokens", "max_logprobs", "use_tqdm_on_load"} <= fields
    import vllm.envs

    assert ENVIRONMENT.keys() <= vllm.envs.environment_variables.keys()
    assert isinstance(VllmConfig.use_v2_model_runner, property)


def test_processed_log_probs_are_those_at_the_temperature() -> None:
    """Where nothing is truncated `processed_logprobs` is log_softmax(logits / T): generation relies on it."""
    own = source(Sampler.sample)
    assert own.index("self.apply_temperature(") < own.index("self.topk_topp_sampler(")
    assert {f.name for f in dataclasses.fields(FlatLogprobs)} >= {"token_ids", "logprobs"}


def test_the_front_end_has_what_the_engine_calls() -> None:
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert parameters(AsyncLLM.abort)[:2] == ["self", "request_id"]
    assert tokens_input([1, 2]) == {"type": "token", "prompt_token_ids": [1, 2]}
    assert "ctx" in {f.name for f in dataclasses.fields(BackgroundResources)}
    assert "self.resources = BackgroundResources(ctx=sync_ctx)" in source(MPClient.__init__)


def test_the_row_scoring_seams_live_in_the_v1_runner() -> None:
    """The CPU runner inherits them; the V2 runner has another design and gets the official fields."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    assert issubclass(CPUModelRunner, gpu_model_runner.GPUModelRunner)
    for name in ("_get_prompt_logprobs_dict", "sample_tokens", "_bookkeeping_sync"):
        assert name not in vars(CPUModelRunner), f"the CPU runner now has a {name} of its own"
