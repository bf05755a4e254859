"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): peft's layers inside the student's own module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from student_trainer.config import LoraConfig
from student_trainer.seeds import ADAPTER, derive_seed

_NAME = "default"
"""peft's, of an adapter that has none of its own."""
_OWN = ".lora_"
"""In the names of an adapter's weights, and of no other."""
_BASE = ".base_layer"


def add_adapter(model: PreTrainedModel, config: LoraConfig, path: str, revision: str | None) -> None:
    """Freezes the model and puts a fresh adapter into it: A random, the same for every run, and B 0.

    Args:
        path, revision: of the model, for those who load the adapter alone.

    Raises:
        ValueError: the model lacks a layer that the config names, or one of them is not linear, or is the output.
    """
    from peft import LoraConfig as PeftLoraConfig

    for name, module in model.named_modules():
        is_inner = isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
        if name.rpartition(".")[2] in config.target_modules and not is_inner:
            raise ValueError(
                f"model.lora.target_modules names {name}, which takes no adapter: name linear layers alone"
            )
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, ADAPTER, config.rank))
        model.add_adapter(
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                # An adapter's folder must find its base from wherever it is loaded.
                base_model_name_or_path=str(Path(path).resolve()) if Path(path).is_dir() else path,
                revision=revision,
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=config.dropout,
                target_modules=list(config.target_modules) or "all-linear",
            )
        )


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether an adapter is trained, and the model's own weights are not."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_adapters_own(name: str) -> bool:
    """Whether a tensor of that name belongs to the adapter."""
    return _OWN in name


def merged(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, under the names of the model without an adapter, with W + alpha / rank B A in place of each adapted W.

    Summed in float32, rounded once to W's dtype; a state without an adapter's tensors comes back as it is.
    """
    plain = {name: tensor for name, tensor in state.items() if not is_adapters_own(name)}
    for name in [name for name in plain if name.endswith(f"{_BASE}.weight")]:
        layer = name.removesuffix(f"{_BASE}.weight")
        a_RI, b_OR = (state[f"{layer}{_OWN}{side}.{_NAME}.weight"].float() for side in "AB")
        module: Any = model.get_submodule(layer)
        delta_OI = module.scaling[_NAME] * (b_OR @ a_RI)
        weight = plain[name]
        # Conv1D, as in GPT-2, keeps its weight transposed.
        delta = delta_OI.T if module.fan_in_fan_out else delta_OI
        plain[name] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    return {name.replace(_BASE, ""): tensor for name, tensor in plain.items()}
