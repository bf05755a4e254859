"""LoRA adapters inside vLLM: where they may sit, and their low-rank products on a CPU.

Relied on in vLLM 0.32.0 (pinned by tests/contract/test_vllm_seams_weights.py): every LoRA linear layer calls its Punica
wrapper's `add_lora_linear`, whose `token_lora_indices` name the slot of each token, -1 for none.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import LinearBase


def linear_modules(model: torch.nn.Module) -> list[str]:
    """The last names of all linear layers: where adapters may sit; neither embeddings nor the LM head are among them.

    vLLM's LoRA on the LM head knows the adapter of the step's sampled tokens only, and rows are asked for elsewhere.
    """
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LinearBase)})


class GroupedLora(PunicaWrapperCPU):
    """The products of all tokens of one adapter at a time.

    vLLM's own CPU kernels copy the adapter for every token, [tokens, out, rank], and index their slots with -1 for
    tokens without one, which Python takes for the last slot.
    """

    @staticmethod
    def install(lora_manager: Any) -> None:
        """Turns the wrappers that vLLM built into ones that group."""
        for wrapper in lora_manager._adapter_manager.punica_wrapper_mapping.values():
            wrapper.__class__ = GroupedLora

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **_: Any,
    ) -> None:
        """Adds scale · B A x to each token's output, in float32, one adapter and one slice of the output at a time."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        slots = self.token_lora_indices[: len(x)]
        for slot in slots.unique().tolist():
            if slot < 0:
                continue
            tokens = slots == slot
            inputs = x[tokens].float()
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                product = inputs @ a[slot, 0].float().T @ b[slot, 0].float().T
                y[tokens, start : start + width] += (scale * product).to(y.dtype)
                start += width
