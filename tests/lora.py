"""Random LoRA adapters of the tiny model, and the model with one merged into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.reference import plain_model

EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_adapter(
    folder: Path, model: Path, *, seed: int, targets: tuple[str, ...] = EVERY_LINEAR, **config: Any
) -> Path:
    """A PEFT folder below `folder`; its random A and B change log-probs by nats."""
    path = folder / f"adapter-{seed}"
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(plain_model(model), LoraConfig(target_modules=list(targets), **settings))
    adapted.save_pretrained(str(path))
    return path


def merged_model(model: Path, adapter: Path) -> Any:
    """The model with B A · alpha / r added to its own weights."""
    return PeftModel.from_pretrained(plain_model(model), str(adapter)).merge_and_unload().eval()
