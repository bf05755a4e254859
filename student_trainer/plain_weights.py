"""The student's weights as any engine loads them: whole, with the adapter added, tied tensors once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from student_trainer.distributed import whole_on_main
from student_trainer.lora import is_adapters_own, merged


def plain_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """By the names of the model without an adapter, on the CPU; tensors that the model ties to others are left out.

    Every rank calls it, and rank 0 alone gets them: one tensor at a time is made whole, where the ranks do not hold the
    whole model anyway (`distributed.gathered`).

    Args:
        dtype: of the floating-point ones; None leaves each its own.
    """
    tied = model.all_tied_weights_keys.keys()
    return {
        name: tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in merged(model, _whole(model, lambda name: name not in tied)).items()
    }


def adapter_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapter's own, likewise."""
    return _whole(model, is_adapters_own)


def _whole(model: PreTrainedModel, is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    return whole_on_main({name: tensor for name, tensor in _state(model) if is_wanted(name)})


def _state(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What `state_dict` holds, by its names; but its hooks would take apart what FSDP has gathered."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, own_name = name.rpartition(".")
        if own_name not in model.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer
