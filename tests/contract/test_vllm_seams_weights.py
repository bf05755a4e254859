"""Every part of vLLM that changing weights and adapters relies on, as test_vllm_seams.py has it of scoring."""

# ruff: noqa: E402  (nothing of vLLM may be imported where it is not installed)
from __future__ import annotations

import base64
import inspect
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCL_UNIQUE_ID_BYTES, NCCLLibrary, ncclUniqueId
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, uid_init_process_group
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.lora.layers import base_linear
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.torch_ops import lora_ops as torch_lora_ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import inplace, layerwise
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from protos.records import TransferredTensor, WeightsTransfer
from teacher_server.engines.base import Adapter
from teacher_server.engines.vllm import _lora_request
from teacher_server.engines.vllm_config import lora_args
from teacher_server.engines.vllm_lora import GroupedLora
from teacher_server.engines.vllm_transfer import GlooWeightTransferEngine, expected_tensors, rendezvous
from teacher_server.transfer import NCCL_ID_BYTES
from tests.contract.test_vllm_seams import parameters, source


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
