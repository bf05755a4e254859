"""Every part of vLLM that the engine relies on and vLLM does not promise: another vLLM fails here, with the reason."""

# ruff: noqa: E402  (nothing of vLLM may be imported where it is not installed)
from __future__ import annotations

import asyncio
import base64
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

vllm = pytest.importorskip("vllm")

import torch
from vllm import RequestOutput, SamplingParams
from vllm.config import CacheConfig, VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCL_UNIQUE_ID_BYTES, NCCLLibrary, ncclUniqueId
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, uid_init_process_group
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.lora.layers import base_linear
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.torch_ops import lora_ops as torch_lora_ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import inplace, layerwise
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys, resolve_kv_cache_block_sizes
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
from vllm.v1.worker.gpu_worker import Worker

from protos.records import PAD_ID, TransferredTensor, WeightsTransfer
from teacher_server.engines.base import Adapter, ScoreRows, ScoreTask
from teacher_server.engines.rows import RowsRequest, to_plain
from teacher_server.engines.vllm import VllmEngine, _lora_request
from teacher_server.engines.vllm_config import (
    ASYNC_SCORING_SCHEDULER,
    ENVIRONMENT,
    OWNED_ARGS,
    SCORING_SCHEDULER,
    SCORING_WORKER,
    lora_args,
)
from teacher_server.engines.vllm_lora import GroupedLora
from teacher_server.engines.vllm_paths import OfficialFields, RunnerRows
from teacher_server.engines.vllm_scheduler import _needs_no_copy, _ReadsUpToFirstRow
from teacher_server.engines.vllm_transfer import GlooWeightTransferEngine, expected_tensors, rendezvous
from teacher_server.engines.vllm_worker import EXTRA_ARG, RowScoring, ScoringWorker
from teacher_server.transfer import NCCL_ID_BYTES
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
    task = score_task()
    _, params = RunnerRows().request(task, read_prefix_cache=True)
    received = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    received = pickle.loads(pickle.dumps(received))
    assert received.extra_args == {EXTRA_ARG: to_plain(task)}
    request = RowsRequest.from_plain(received.extra_args[EXTRA_ARG], torch.device("cpu"))
    assert request.completion_ids.tolist() == task.completion_ids.tolist()


def test_a_request_says_whether_it_reads_the_prefix_cache() -> None:
    for read_prefix_cache in (True, False):
        _, params = RunnerRows().request(score_task(), read_prefix_cache=read_prefix_cache)
        assert params.skip_reading_prefix_cache is not read_prefix_cache
        assert params.prompt_logprobs is None  # which would make vLLM skip the cache by itself


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
    rng = np.random.default_rng(0)
    task = replace(
        score_task(),
        context_ids=rng.integers(0, 300, 64).astype(np.int32),
        completion_ids=rng.integers(0, 300, 40).astype(np.int32),
        candidate_ids=np.empty((40, 0), np.int32),
    )

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


def test_weights_are_reloaded_from_an_iterator() -> None:
    """`ScoringWorker.replace_weights` goes through vLLM's own reload, and knows what a broken-off one leaves."""
    assert parameters(inplace.reload_weights)[:3] == ["vllm_config", "model", "weights_iterator"]
    assert "self.reset_lora_state()" in source(GPUModelRunner.reload_weights)
    assert "model.load_weights(weights_iterator)" in source(inplace.reload_weights)
    assert parameters(layerwise._place_kernel_tensors) == ["layer", "info"]
    assert "if info.can_load():" in source(layerwise.initialize_layerwise_reload)
    # Packing keeps the weight, so that doing it again is the same as doing it once.
    packing = source(UnquantizedEmbeddingMethod.process_weights_after_loading)
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=False)" in packing
    assert parameters(AsyncLLM.reset_prefix_cache)[1] == "reset_running_requests"
    assert parameters(AsyncLLM.collective_rpc)[1:4] == ["method", "timeout", "args"]


def test_weights_come_by_vllm_s_transfer_engines() -> None:
    """`VllmEngine.receive_weights` has a worker meet the sender, then `ScoringWorker.receive_weights` does the rest."""
    assert 'kwargs={"init_info": request.init_info}' in source(AsyncLLM.init_weight_transfer_engine)
    assert parameters(WeightTransferEngineFactory.create_engine) == ["config", "vllm_config", "device", "model"]
    assert "WeightTransferEngineFactory.create_engine(" in source(Worker.load_model)
    for step in ("start_weight_update", "update_weights", "finish_weight_update"):
        assert f"self.weight_transfer_engine.{step}(" in source(getattr(Worker, step)) + source(
            Worker._start_weight_update
        )
    assert "if self._weight_update_active:\n            raise" in source(Worker.shutdown_weight_transfer_engine)
    assert WeightTransferConfig(backend="gloo").backend == "gloo"
    assert WeightTransferEngineFactory._registry["gloo"]() is GlooWeightTransferEngine


def test_vllm_s_nccl_engine_takes_what_a_transfer_says() -> None:
    """By a unique id, and never by its store, which unpickles what a sender puts there; one tensor at a time."""
    tensors = (TransferredTensor("a", "BF16", (2, 3)), TransferredTensor("b", "F32", ()))
    unique_id = bytes(range(128))
    transfer = WeightsTransfer("nccl", base64.b64encode(unique_id).decode(), tensors)
    where = NCCLWeightTransferInitInfo(**rendezvous(transfer, 2, 60.0))
    assert where.nccl_unique_id_bytes == unique_id
    assert (where.rank_offset, where.world_size, where.packed, where.master_address) == (1, 3, False, None)
    wanted = NCCLWeightTransferUpdateInfo(**expected_tensors(transfer))
    assert (wanted.names, wanted.dtype_names, wanted.shapes) == (["a", "b"], ["bfloat16", "float32"], [[2, 3], []])
    assert "pickle.loads" in source(StatelessProcessGroup.broadcast_obj)
    receive = source(NCCLWeightTransferEngine.receive_weights)
    assert "self.model_update_group.broadcast(\n                        weight, src=0" in receive
    for step, does in (("start_weight_update", "initialize"), ("finish_weight_update", "finalize")):
        assert f"{does}_layerwise_reload(self.model" in source(getattr(NCCLWeightTransferEngine, step))


def test_a_sender_of_nccl_is_vllm_s_own_communicator() -> None:
    assert parameters(uid_init_process_group) == ["nccl_unique_id_bytes", "rank", "world_size", "device"]
    assert parameters(PyNcclCommunicator.broadcast) == ["self", "tensor", "src", "stream"]
    assert len(bytes(ncclUniqueId())) == NCCL_UNIQUE_ID_BYTES == NCCL_ID_BYTES
    assert parameters(NCCLLibrary.ncclGetUniqueId) == ["self"]


def test_an_adapter_has_a_prefix_cache_of_its_own() -> None:
    """Each version has a new name; vLLM's cache keys hold it."""
    assert '("lora", lora_request.lora_name' in source(_gen_lora_extra_hash_keys)
    request = _lora_request(Adapter(3, Path("/a")))
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("adapter-3", 3, "/a")
    arguments = lora_args(max_adapters=2, max_lora_rank=9)
    # One slot is for a new version beside the old; ranks come in vLLM's own steps.
    assert arguments == {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}
    with pytest.raises(ValueError, match="max_lora_rank is 1000; vLLM takes at most 512"):
        lora_args(max_adapters=1, max_lora_rank=1000)


def test_adapters_sit_on_linear_layers_and_on_a_cpu_are_grouped() -> None:
    """vLLM's kernels read slot -1, the last, for tokens without an adapter; ours leave those tokens alone."""
    slots = torch.tensor([1, -1, 0, 1])
    x, y = torch.arange(8.0).reshape(4, 2), torch.zeros(4, 3)
    a, b = (
        torch.tensor([[[[1.0, 0.0]]], [[[0.0, 2.0]]]]),
        torch.ones(2, 1, 3, 1),
    )  # [slots, 1, r, in], [slots, 1, out, r]
    grouped: Any = object.__new__(GroupedLora)
    grouped._token_lora_indices, grouped.indices_len = slots, [4]
    grouped.add_lora_linear(y, x, (a,), (b,), 0.5, (3,))
    # Half of 2 · x[1] in slot 1, half of x[0] in slot 0, nothing in between.
    assert y.tolist() == [[1.0] * 3, [0.0] * 3, [2.0] * 3, [7.0] * 3]
    assert "self._token_lora_indices[:token_lora_len]" in source(PunicaWrapperCPU.token_lora_indices.fget)
    assert "self.punica_wrapper.add_lora_linear(" in inspect.getsource(base_linear)
    assert "lora_b_weights[lora_indices_tensor]" in inspect.getsource(torch_lora_ops), (
        "read vllm_lora.GroupedLora again"
    )
    assert "self.lora_config.target_modules is None" in source(LoRAModelManager._create_lora_modules)


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


def score_task(*, temperature: float = 1.0, top_k: int = 2, entropy: bool = False) -> ScoreTask:
    return ScoreTask(
        context_ids=np.array([5, 6, 7], np.int32),
        completion_ids=np.array([8, 9], np.int32),
        temperature=temperature,
        top_k=top_k,
        candidate_ids=np.array([[1, PAD_ID], [2, 3]], np.int32),
        entropy=entropy,
    )


def test_runner_rows_send_all_but_the_last_id() -> None:
    prompt_ids, params = RunnerRows().request(score_task(temperature=0.7), read_prefix_cache=True)
    assert prompt_ids == [5, 6, 7, 8]  # position 2 predicts 8, position 3 predicts 9
    assert params.max_tokens == 1


def test_official_fields_ask_for_the_completion_and_the_candidates() -> None:
    prompt_ids, params = OfficialFields().request(score_task(), read_prefix_cache=True)
    assert prompt_ids == [5, 6, 7, 8, 9]
    assert params.prompt_logprob_start == 2  # the row that predicts the first completion token
    assert params.prompt_logprob_token_ids is not None
    assert params.prompt_logprob_token_ids.tolist() == [[8, 1, PAD_ID], [9, 2, 3]]
    assert params.skip_reading_prefix_cache  # a top-K needs every row of the prompt
    _, params = OfficialFields().request(score_task(top_k=0), read_prefix_cache=True)
    assert (params.prompt_logprobs, params.skip_reading_prefix_cache) == (None, False)


def test_official_fields_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0\.7"):
        OfficialFields().request(score_task(temperature=0.7), read_prefix_cache=True)
    with pytest.raises(ValueError, match="entropy"):
        OfficialFields().request(score_task(entropy=True), read_prefix_cache=True)


def test_official_fields_are_read_from_the_end_of_the_prompt() -> None:
    """A prompt of five tokens has four rows; the last two are the completion's, each led by its own token."""
    flat = FlatLogprobs()
    flat.append(None)
    for row, (own, first, second) in enumerate([(6, 1, 2), (7, 1, 2), (8, 4, 8), (9, 9, 4)]):
        flat.append_fast([own, first, second], [-3.0 - row, -1.0 - row, -2.0 - row], chain([3, 1, 2]), [None] * 3)
    output = RequestOutput(
        request_id="0",
        prompt=None,
        prompt_token_ids=[5, 6, 7, 8, 9],
        prompt_logprobs=flat,
        outputs=[],
        finished=True,
        prompt_token_id_logprobs=np.array([[-5.0, -1.5, -np.inf], [-6.0, -2.5, -3.5]], np.float32),
    )
    rows = OfficialFields().rows(score_task(), output)
    assert rows is not None
    assert rows.sampled_logprobs.tolist() == [-5.0, -6.0]
    assert rows.top_ids.tolist() == [[4, 8], [9, 4]]
    assert rows.top_logprobs.tolist() == [[-3.0, -4.0], [-4.0, -5.0]]
    np.testing.assert_array_equal(rows.candidate_logprobs, [[-1.5, np.nan], [-2.5, -3.5]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the V2 model runner needs a CUDA device")
def test_official_fields_equal_runner_rows(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same task through both model runners of one GPU build."""
    import asyncio

    from tests.tiny_model import build_tiny_qwen3

    model = str(build_tiny_qwen3(tmp_path))

    async def score(use_v2: str) -> Any:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", use_v2)
        engine = await VllmEngine.create(model, dtype="float32", kv_cache_gib=1.0)
        rows = await engine.score(score_task())
        await engine.close()
        return engine.info.score_path, rows

    path, expected = asyncio.run(score("0"))
    assert path == "runner-rows"
    path, rows = asyncio.run(score("1"))
    assert path == "official-fields"
    for name in ("sampled_logprobs", "top_logprobs", "candidate_logprobs"):
        np.testing.assert_allclose(getattr(rows, name), getattr(expected, name), rtol=0, atol=1e-4)
    assert rows.top_ids.tolist() == expected.top_ids.tolist()


@pytest.mark.parametrize("name", sorted(OWNED_ARGS))
def test_an_argument_that_the_engine_owns_is_refused(name: str) -> None:
    import asyncio

    with pytest.raises(ValueError, match=name):
        asyncio.run(VllmEngine.create("unused", engine_args={name: None}))
