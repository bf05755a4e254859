"""The student's weights as any engine loads them: whole, with the adapter added, tied tensors once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from student_trainer.distributed import is_main, whole
from student_trainer.lora import is_adapters_own, merged


def plain_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """By the names of the model without an adapter, on the CPU; tensors that the model ties to others are left out.

    Every rank calls it, and rank 0 alone gets them: one tensor at a time is made whole.

    Args:
        dtype: of the floating-point ones; None leaves each its own.
    """
    tied = model.all_tied_weights_keys.keys()
    return {
        name: tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in merged(model, _whole(model, model.state_dict().keys() - tied)).items()
    }


def adapter_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The adapter's own, likewise."""
    return _whole(model, filter(is_adapters_own, model.state_dict()))


def _whole(model: PreTrainedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    state, kept = model.state_dict(), set(names)
    tensors = ((name, whole(tensor)) for name, tensor in state.items() if name in kept)
    return {name: tensor.cpu() for name, tensor in tensors if is_main()}
