"""Several processes as one trainer: who this process is, what the ranks tell each other, and sharded weights (FSDP2).

Started by `torchrun`, every rank runs the same loop on its share of a step's problems. Whatever is logged or decided
follows from what all ranks gathered, so that all decide alike; rank 0 alone writes. In a single process each function
here is the identity, and torch.distributed is never started.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from student_trainer.stopped import PeerLost

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

K = TypeVar("K")
T = TypeVar("T")

PATIENCE = timedelta(minutes=60)
"""How long a rank waits for another: longer than a teacher may be away, or than rank 0 writes a checkpoint. A rank that
dies is noticed at once, by its closed connection and by torchrun."""

KNOWN_TO_ALL = "(every process of the run knows that one has failed)"
"""A note on an error that came out of an agreement."""


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _is_joined() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if _is_joined() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes for all."""
    return rank() == 0


def local_device(name: str) -> torch.device:
    """The device called `name` in the config; "auto" is this rank's own CUDA device, where there is one."""
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


@contextmanager
def joined() -> Iterator[None]:
    """Meets the other ranks that torchrun started; they part when the process ends, for they can meet only once.

    Raises:
        PeerLost: another rank ended first.
    """
    if world_size() > 1 and not _is_joined():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device("cuda"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
        if not is_main():  # what all ranks would say, rank 0 says
            logging.getLogger("student_trainer").setLevel(logging.ERROR)
    try:
        yield
    except RuntimeError as error:
        # Gloo has no error class of its own; its messages name its source file.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        atexit.unregister(dist.destroy_process_group)  # it would wait for the lost one
        raise PeerLost(
            f"rank {rank()}: another of the {world_size()} processes of this run has ended; its own message says why. "
            "Run the same command to go on from the last checkpoint"
        ) from error


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of `items`, consecutive: the shares in order of rank are the whole. Fewer than ranks, and some
    rank gets none."""
    num_ranks, mine = world_size(), rank()
    return items[mine * len(items) // num_ranks : (mine + 1) * len(items) // num_ranks]


def gather(value: T) -> list[T]:
    """Every rank's `value`, in order of rank; the same list on every rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def sums(values: Mapping[str, float]) -> dict[str, float]:
    """The sum over ranks of each named value; a name that a rank lacks counts 0 there."""
    totals: dict[str, float] = {}
    for part in gather(dict(values)):
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def means(values: Mapping[str, float], weight: float) -> dict[str, float]:
    """Means over what all ranks have, from each rank's named means over the `weight` things that it has; a name that a
    rank lacks counts none there."""
    if world_size() == 1:
        return dict(values)
    totals = sums({name: value * weight for name, value in values.items()})
    weights = sums(dict.fromkeys(values, weight))
    return {name: total / weights[name] for name, total in totals.items()}


def agreed(work: Callable[[], T]) -> T:
    """What `work` returned on this rank, once it has returned on every rank.

    `work` may hold agreements of its own. A rank that failed before one of those has met there, with its outer one,
    those who came to it; so an error that came out of an agreement is known to all, and goes on without another.

    Raises:
        PeerLost: it raised on another rank, whose own message says why; this rank's own error is raised as it is.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        if KNOWN_TO_ALL in getattr(raised, "__notes__", ()):
            raise
        error = raised
    failed = [index for index, is_failed in enumerate(gather(error is not None)) if is_failed]
    if error is None and failed:
        error = PeerLost(f"rank {rank()}: rank {failed[0]} could not go on; its own message says why")
    if error is not None:
        error.add_note(KNOWN_TO_ALL)
        raise error
    return result  # pyright: ignore[reportReturnType]


def by_main(work: Callable[[], T]) -> T:
    """What `work` returned on rank 0, which alone does it; where it raises there, every rank raises as in `agreed`."""
    return from_main(agreed(lambda: work() if is_main() else None))  # pyright: ignore[reportReturnType]


def from_main(value: T) -> T:
    """Rank 0's `value`."""
    return gather(value)[0]


def shard(model: torch.nn.Module, blocks: set[str], compute_dtype: torch.dtype) -> None:
    """Shards the weights over the ranks, in place (FSDP2: Zhao et al. 2023, arXiv:2304.11277; torch's fully_shard).

    What is trained is kept in float32 and gathered in `compute_dtype`. Gradients are summed over ranks, not averaged:
    a loss is divided by the tokens of all ranks.

    Args:
        blocks: class names of the modules that are gathered one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every rank holds the whole weights, and a forward pass needs no other rank: ranks may write completions
    of unequal lengths, and a decoding step gathers nothing. The weights must not be trained inside."""
    modules = _sharded(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that the ranks hold the shards of; a tensor that is not sharded is itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """The tensors, whole and on the CPU, on rank 0, and none elsewhere; every rank calls it. One is whole at a time."""
    return {key: tensor.cpu() for key, tensor in ((key, whole(part)) for key, part in tensors.items()) if is_main()}


def sharded_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """`tensor`, which every rank has whole, sharded as `model` is, without communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sharded(model: torch.nn.Module) -> list[FSDPModule]:
    if world_size() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
