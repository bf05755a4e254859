"""Rank 0 of a transfer of weights: who broadcasts to the workers of a server's engine, over gloo or over nccl.

Server and sender meet anew for each transfer, so that nothing is left of one that failed.
"""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import BroadcastOptions, ProcessGroupGloo

from protos.route import address_towards
from protos.wire import STORE_KEY

_Gloo: Any = ProcessGroupGloo
"""torch's stubs leave most of it out."""

POLL_S = 0.02
"""How often a sender looks whether the workers have come."""


class Sender(Protocol):
    """Broadcasts tensors to workers that meet it.

    Attributes:
        rendezvous: see WeightsTransfer.
    """

    rendezvous: str

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Waits for the workers and broadcasts these in order; one that is closed meanwhile returns or raises."""
        ...

    def close(self) -> None:
        """Leaves the group; workers still in it are told, where the backend can tell them."""
        ...


class GlooSender:
    """Over TCP, from the CPU; see Sender.

    Args:
        host, port: of the server, to listen on the address that it sees.
        num_workers: who will come.
        timeout_s: for the group, once they have.
    """

    def __init__(self, host: str, port: int, num_workers: int, timeout_s: float) -> None:
        self._num_workers = num_workers
        self._timeout = timedelta(seconds=timeout_s)
        self._address = address_towards(host, port)
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.create_server((self._address, 0), family=family)
        own_port = listener.getsockname()[1]
        self._store = TCPStore(
            self._address,
            own_port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=False,
        )
        self.rendezvous = f"[{self._address}]:{own_port}" if ":" in self._address else f"{self._address}:{own_port}"
        self._group: Any = None
        self._closed = threading.Event()

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """See Sender."""
        while self._store.add(STORE_KEY, 0) < self._num_workers:
            if self._closed.wait(POLL_S):
                return
        options = _Gloo._Options()
        options._timeout = self._timeout
        options._devices = [_Gloo.create_device(hostname=self._address)]
        group = self._group = _Gloo(self._store, 0, 1 + self._num_workers, options)
        for tensor in tensors:
            # As bytes: gloo does not know every type.
            group.broadcast([tensor.cpu().contiguous().reshape(-1).view(torch.uint8)], BroadcastOptions()).wait()

    def close(self) -> None:
        """See Sender."""
        self._closed.set()
        self._group = None


class NcclSender:
    """From this process's first GPU, by the communicator that vLLM's nccl engine has on its side; see Sender.

    nccl waits for a server that never comes for as long as the process lives.

    Raises:
        ImportError, OSError, ValueError: vLLM, nccl or a GPU is not to be had here.
    """

    def __init__(self, num_workers: int) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self._num_workers = num_workers
        self._unique_id = bytes(NCCLLibrary().ncclGetUniqueId())
        self.rendezvous = base64.b64encode(self._unique_id).decode()
        self._group: Any = None

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """See Sender."""
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)  # of this thread
        self._group = uid_init_process_group(self._unique_id, 0, 1 + self._num_workers, device)
        stream = torch.cuda.current_stream()
        for tensor in tensors:
            self._group.broadcast(tensor.to(device).contiguous(), src=0, stream=stream)
        stream.synchronize()

    def close(self) -> None:
        """See Sender."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()
