"""The student's model, and how its weights are stepped."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from student_trainer.config.base import Section


class LoraConfig(Section):
    """Low-rank adapters: B A · alpha / rank is added to linear layers, and only A and B are trained."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapter's input while it is trained."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers, such as "q_proj"; none given means every linear layer but the output."""


class ModelConfig(Section):
    """The student."""

    path: str
    """A folder in transformers' format, or a Hub id."""
    revision: str | None = None
    """A Hub revision; None is the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; bfloat16 is trained through float32 master weights."""
    lora: LoraConfig | None = None
    """None trains every weight; an empty table trains an adapter with the defaults."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass instead of keeping them: less memory, one more forward pass."""
    chat_template: str | None = None
    """For a base model that has none: "plain", "chatml", or a Jinja file. None keeps the model's own."""
    device: str = "auto"
    """"auto" takes CUDA where there is one."""


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises from 0 to `lr`: the first steps of AdamW are its largest."""
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The rate at the last step, as a share of `lr`."""
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_size: PositiveInt = 64
    """Sequences in one forward pass; gradients accumulate to the whole step's token mean."""
