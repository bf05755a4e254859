"""Weights that a sender broadcasts to vLLM's workers, by vLLM's weight-transfer engines.

Between GPUs the engine is vLLM's own, `nccl`. `gloo` is the same engine over a group that CPUs have too, whose ranks
notice a sender that is gone. Ranks meet over raw bytes alone: vLLM's other way to meet for nccl, a TCP store, unpickles
what the sender puts there (StatelessProcessGroup.broadcast_obj).

What it relies on in vLLM 0.32.0 is pinned by tests/contract/test_vllm_seams_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import BroadcastOptions, ProcessGroupGloo
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from protos.records import WeightsTransfer
from protos.route import address_towards
from protos.wire import STORE_KEY, TENSOR_DTYPES
from teacher_server.engines.base import WeightsUntouchedError

_Gloo: Any = ProcessGroupGloo
"""torch's stubs leave most of it out."""

MEETING_S = 10.0
"""The sender's store listens before the server is told of it, so that it is there at once or never."""


def rendezvous(transfer: WeightsTransfer, num_workers: int, timeout_s: float) -> dict[str, Any]:
    """The `init_info` of the backend's engine; the sender is rank 0."""
    ranks = {"rank_offset": 1, "world_size": 1 + num_workers}
    if transfer.backend == "nccl":
        return {"nccl_unique_id_b64": transfer.rendezvous, "packed": False, **ranks}
    where = urlsplit(f"//{transfer.rendezvous}")
    return {"host": where.hostname, "port": where.port, "timeout_s": timeout_s, **ranks}


def expected_tensors(transfer: WeightsTransfer) -> dict[str, Any]:
    """The `update_info` of either engine; WeightsUntouchedError for a type that torch has not."""
    for tensor in transfer.tensors:
        if tensor.dtype not in TENSOR_DTYPES:
            raise WeightsUntouchedError(f"{tensor.name} is {tensor.dtype}, which no transfer carries")
    return {
        "names": [tensor.name for tensor in transfer.tensors],
        "dtype_names": [TENSOR_DTYPES[tensor.dtype] for tensor in transfer.tensors],
        "shapes": [list(tensor.shape) for tensor in transfer.tensors],
    }


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where this worker meets the sender; `timeout_s` is for all that follows."""

    host: str
    port: int
    timeout_s: float
    rank_offset: int
    world_size: int


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, NCCLWeightTransferUpdateInfo]):
    """vLLM's dense nccl engine over a gloo group: tensors come to the CPU and are loaded from there."""

    init_info_cls = GlooInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo
    start_weight_update = NCCLWeightTransferEngine.start_weight_update
    finish_weight_update = NCCLWeightTransferEngine.finish_weight_update

    _group: Any = None
    _until: float

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Meets the sender.

        Raises:
            RuntimeError: it is not there.
        """
        self._until = monotonic() + init_info.timeout_s
        patience = timedelta(seconds=min(MEETING_S, init_info.timeout_s / 2))
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank + init_info.rank_offset
        try:
            store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=patience)
            store.add(STORE_KEY, 1)
            options = _Gloo._Options()
            options._timeout = patience
            own_address = address_towards(init_info.host, init_info.port)
            options._devices = [_Gloo.create_device(hostname=own_address)]
            self._group = _Gloo(store, rank, init_info.world_size, options)
        except (RuntimeError, OSError) as error:
            raise RuntimeError(f"no sender at {init_info.host}:{init_info.port}: {error}") from error

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM's, which waits for an accelerator; here every tensor is whole before it is loaded."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Loads the tensors as they come.

        Raises:
            RuntimeError: the sender is gone, or the time is over.
        """
        loading: Any = self.model
        loading.load_weights(self._tensors(update_info))

    def shutdown(self) -> None:
        """Leaves the group."""
        self._group = None

    def _tensors(self, expected: NCCLWeightTransferUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._group is not None
        for i, (name, dtype, shape) in enumerate(
            zip(expected.names, expected.dtype_names, expected.shapes, strict=True)
        ):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            options = BroadcastOptions()
            options.timeout = timedelta(seconds=max(self._until - monotonic(), 0.001))
            try:
                # As bytes: gloo does not know every type.
                self._group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()
            except RuntimeError as error:
                raise RuntimeError(
                    f"the sender was lost after {i} of {len(expected.names)} tensors: {error}"
                ) from error
            yield name, tensor


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
