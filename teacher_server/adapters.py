"""Whether a LoRA adapter is one that every engine applies in full: its PEFT configuration and its tensors; pure.

An adapter adds B A · alpha / r to linear layers (Hu et al. 2021, arXiv:2106.09685), or B A · alpha / sqrt(r) with
rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732). Whatever else PEFT's configuration can ask for is
refused, not ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protos.errors import InvalidRequest
from teacher_server.tensor_files import FLOATS, TensorSpec

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Before the model's own names in an adapter's tensors, as PEFT writes them."""

UNSERVED = ("lm_head", "embed_tokens")
"""Layers whose adapters vLLM cannot apply to arbitrary rows."""

DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""Keys that say how an adapter was trained or written; the rest must be empty or false."""

MERGING_INITS = ("pissa", "olora", "corda", "loftq")
"""Initialisations that change the model's own weights too, so that the adapter alone is not what was trained."""


class _Config(BaseModel):
    """The keys of adapter_config.json that decide what an adapter does."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: list[str]
    use_rslora: bool = False
    bias: Literal["none"] = "none"


def check_adapter(config_text: str, tensors: dict[str, TensorSpec], model: dict[str, TensorSpec], max_rank: int) -> str:
    """The adapter_config.json that engines read: the checked keys alone, and the layers by their full names.

    Args:
        tensors, model: what the adapter's and the model's safetensors hold.

    Raises:
        InvalidRequest: with the key or tensor at fault.
    """
    config = _config(config_text)
    if config.r > max_rank:
        raise InvalidRequest(
            f"the adapter's rank is {config.r}; this server takes at most {max_rank} (--max-lora-rank)",
            field="adapter_config.r",
        )
    for name in config.target_modules:
        if name.rpartition(".")[2] in UNSERVED:
            raise InvalidRequest(
                f"the adapter targets {name}; adapters on {' and '.join(UNSERVED)} are not served",
                field="adapter_config.target_modules",
            )
    layers = _layers(config.target_modules, model)
    _check_tensors(layers, tensors, config.r)
    return json.dumps(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "target_modules": sorted(layers),
        }
    )


def _config(text: str) -> _Config:
    try:
        config = _Config.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(("adapter_config", *map(str, first["loc"])))
        raise InvalidRequest(f"{CONFIG_FILE} is not that of a LoRA adapter: {first['msg']}", field=where) from error
    extra: dict[str, Any] = config.model_extra or {}
    for name, value in extra.items():
        if value and name not in DESCRIPTIVE:
            raise InvalidRequest(
                f"{name} is {str(value)[:80]}; only plain LoRA is served, so it must be empty or false",
                field=f"adapter_config.{name[:80]}",
            )
    init = str(extra.get("init_lora_weights", "")).lower()
    if init.startswith(MERGING_INITS):
        raise InvalidRequest(
            f"init_lora_weights is {init[:80]!r}, which changes the model's own weights too; convert the adapter to "
            "plain LoRA with PEFT's path_initial_model_for_weight_conversion",
            field="adapter_config.init_lora_weights",
        )
    return config


def _layers(targets: list[str], model: dict[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The targeted layers by their full names, each with its weight's shape [out, in]; PEFT matches whole parts."""
    linear = {
        name.removesuffix(".weight"): spec.shape
        for name, spec in model.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }
    layers: dict[str, tuple[int, ...]] = {}
    for target in targets:
        matched = {name: shape for name, shape in linear.items() if name == target or name.endswith(f".{target}")}
        if not matched:
            raise InvalidRequest(
                f"the adapter targets {target[:80]!r}, and the model has no such linear layer",
                field="adapter_config.target_modules",
            )
        layers |= matched
    return layers


def _check_tensors(layers: dict[str, tuple[int, ...]], tensors: dict[str, TensorSpec], rank: int) -> None:
    """Every targeted layer has its A [r, in] and B [out, r] in floating point, and nothing else is there."""
    shapes = {}
    for layer, (num_out, num_in) in layers.items():
        shapes[f"{PREFIX}{layer}.lora_A.weight"] = (rank, num_in)
        shapes[f"{PREFIX}{layer}.lora_B.weight"] = (num_out, rank)
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors:
            raise InvalidRequest(f"{name} is missing from the adapter, which targets its layer")
        if name not in shapes:
            raise InvalidRequest(f"{name} belongs to no layer that the adapter targets; leave it out")
        spec = tensors[name]
        if spec.shape != shapes[name] or spec.dtype not in FLOATS:
            raise InvalidRequest(f"{name} is {spec}; it must be {list(shapes[name])} in {', '.join(FLOATS)}")
