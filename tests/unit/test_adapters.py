"""Which adapters are served, and what engines are told of them: files that PEFT itself writes, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protos.errors import InvalidRequest
from teacher_server.adapters import check_adapter
from teacher_server.tensor_files import TensorFiles, TensorSpec, read_specs
from tests.lora import build_adapter

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
MODEL = {
    "model.embed_tokens.weight": TensorSpec("F32", (10, 6)),
    "model.layers.0.q_proj.weight": TensorSpec("F32", (8, 6)),
    "model.layers.0.q_proj.bias": TensorSpec("F32", (8,)),
    "model.layers.1.q_proj.weight": TensorSpec("F32", (8, 6)),
    "model.layers.1.up_q_proj.weight": TensorSpec("F32", (8, 6)),
    "model.norm.weight": TensorSpec("F32", (6,)),
    "lm_head.weight": TensorSpec("F32", (10, 6)),
}
TENSORS = {
    f"base_model.model.model.layers.{i}.q_proj.lora_{part}.weight": TensorSpec("BF16", shape)
    for i in (0, 1)
    for part, shape in (("A", (4, 6)), ("B", (8, 4)))
}
LORA_A = "base_model.model.model.layers.0.q_proj.lora_A.weight"


def check(config: dict[str, Any], tensors: dict[str, TensorSpec] = TENSORS) -> dict[str, Any]:
    return json.loads(check_adapter(json.dumps(config), tensors, MODEL, 8))


def test_engines_are_told_the_layers_by_their_full_names() -> None:
    """ "q_proj" is the last part of two names and the end, but no part, of a third."""
    told = check(
        CONFIG | {"lora_dropout": 0.1, "megatron_core": "megatron.core", "loftq_config": {}, "use_dora": False}
    )
    assert told == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "target_modules": ["model.layers.0.q_proj", "model.layers.1.q_proj"],
    }


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}]
)
def test_what_peft_writes_is_taken(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = build_adapter(tmp_path, tiny_model, seed=0, **settings)
    tensors = read_specs(adapter / "adapter_model.safetensors")
    text = (adapter / "adapter_config.json").read_text()
    told = json.loads(check_adapter(text, tensors, TensorFiles.find(tiny_model).specs, 8))
    assert len(told["target_modules"]) == 2 * 7  # seven linear layers in each of two
    assert told["use_rslora"] is ("use_rslora" in settings)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "rank": ({"r": 16}, "adapter_config.r", "the adapter's rank is 16; this server takes at most 8"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "adapter_config.target_modules", "targets lm_head"),
    "embedding": ({"target_modules": ["model.embed_tokens"]}, "adapter_config.target_modules", "targets model.embed_"),
    "no layer": ({"target_modules": ["x_proj"]}, "adapter_config.target_modules", "the model has no such linear layer"),
    "pattern": ({"target_modules": ".*_proj"}, "adapter_config.target_modules", "valid array"),
    "another method": ({"peft_type": "IA3"}, "adapter_config.peft_type", "'LORA'"),
    "bias": ({"bias": "all"}, "adapter_config.bias", "'none'"),
    "alpha": ({"lora_alpha": 0}, "adapter_config.lora_alpha", "greater than 0"),
    "DoRA": ({"use_dora": True}, "adapter_config.use_dora", "only plain LoRA is served"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "adapter_config.modules_to_save", "only plain LoRA"),
    "patterns": ({"rank_pattern": {"q_proj": 2}}, "adapter_config.rank_pattern", "only plain LoRA"),
    "new in PEFT": ({"use_tomorrow": 1}, "adapter_config.use_tomorrow", "only plain LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "adapter_config.init_lora_weights", "changes the model's own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_engines_would_not_apply_in_full_is_refused(case: str) -> None:
    change, field, words = REFUSED[case]
    with pytest.raises(InvalidRequest) as caught:
        check(CONFIG | change)
    assert caught.value.field == field
    assert words in caught.value.message


BAD_TENSORS: dict[str, tuple[dict[str, TensorSpec | None], str]] = {
    "missing": ({LORA_A: None}, f"{LORA_A} is missing"),
    "head's own": ({"base_model.model.lm_head.weight": TensorSpec("F32", (10, 6))}, "belongs to no layer"),
    "rank": ({LORA_A: TensorSpec("F32", (5, 6))}, f"{LORA_A} is F32 [5, 6]; it must be [4, 6]"),
    "type": ({LORA_A: TensorSpec("I8", (4, 6))}, f"{LORA_A} is I8 [4, 6]"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_every_targeted_layer_has_its_two_tensors_and_no_other(case: str) -> None:
    change, words = BAD_TENSORS[case]
    tensors = {name: spec for name, spec in {**TENSORS, **change}.items() if spec is not None}
    with pytest.raises(InvalidRequest) as caught:
        check(CONFIG, tensors)
    assert words in caught.value.message
