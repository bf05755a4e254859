"""The student: its weights, its tokenizer, and what a teacher must share with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from protos.fingerprint import tokenizer_fingerprint
from protos.records import TokenizerFingerprint
from student_trainer import distributed
from student_trainer.config import ConfigError, ModelConfig
from student_trainer.lm_head import LmHead, find_head
from student_trainer.lora import add_adapter
from student_trainer.text import eos_token_ids, set_chat_template, turn_end_id


@dataclass(frozen=True)
class Student:
    """A model in training.

    Attributes:
        eos_token_ids: each ends a completion.
        turn_end_id: the one of them that ends an assistant's turn, and that fine-tuning teaches.
        dtype: of the computation, and of the weights that others load.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    turn_end_id: int
    dtype: torch.dtype

    @cached_property
    def head(self) -> LmHead:
        """From hidden states to logits; see `find_head`."""
        return find_head(self.model)

    @property
    def vocab_size(self) -> int:
        """V, the width of the model's output."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def fingerprint(self) -> TokenizerFingerprint:
        """What a teacher must share."""
        return tokenizer_fingerprint(self.tokenizer, eos_token_ids=self.eos_token_ids, vocab_size=self.vocab_size)


def load_student(config: ModelConfig) -> Student:
    """Loads the model and its tokenizer from a folder or the Hub, sharded where several processes train together.

    Raises:
        ConfigError: there is no such model, it names no EOS or has no chat template, its logits cannot be computed by
            chunks, or LoRA does not fit it.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.path, revision=config.revision or "main", dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision or "main")
        set_chat_template(tokenizer, config.chat_template)
        ids = eos_token_ids(model, tokenizer)
        if model.generation_config is not None:
            model.generation_config.eos_token_id = list(ids)  # whoever serves a checkpoint must stop there too
        if config.lora:
            add_adapter(model, config.lora, config.path, config.revision)
        model.to(distributed.local_device(config.device))  # pyright: ignore[reportArgumentType]
        student = Student(model, tokenizer, ids, turn_end_id(tokenizer), dtype)
        _ = student.head  # found at load, so that a model that has none is refused here
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {config.path!r}: {str(error).splitlines()[0]}") from error
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if distributed.world_size() > 1:
        distributed.shard(model, set(model._no_split_modules or ()), dtype)
    return student


def load_backbone(config: ModelConfig) -> PreTrainedModel:
    """The model without its LM head, in float32."""
    model: PreTrainedModel = AutoModel.from_pretrained(
        config.path, revision=config.revision or "main", dtype=torch.float32
    )
    return model.to(distributed.local_device(config.device))  # pyright: ignore[reportArgumentType]
