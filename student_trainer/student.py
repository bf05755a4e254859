"""The student: its weights, its tokenizer, and what a teacher must share with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from protos.fingerprint import tokenizer_fingerprint
from protos.records import TokenizerFingerprint
from student_trainer import distributed
from student_trainer.config import ConfigError, LoraConfig, ModelConfig
from student_trainer.seeds import ADAPTER, derive_seed
from student_trainer.text import eos_token_ids, set_chat_template, turn_end_id

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Student:
    """A model in training.

    Attributes:
        eos_token_ids: each ends a completion.
        turn_end_id: the one of them that ends an assistant's turn, and that fine-tuning teaches.
        dtype: of the computation, and of the weights that are saved for others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    turn_end_id: int
    dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        """V, the width of the model's output."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter is trained, and the model's own weights are not."""
        return bool(self.model._hf_peft_config_loaded)

    @property
    def fingerprint(self) -> TokenizerFingerprint:
        """What a teacher must share."""
        return tokenizer_fingerprint(self.tokenizer, eos_token_ids=self.eos_token_ids, vocab_size=self.vocab_size)


def load_student(config: ModelConfig) -> Student:
    """Loads the model and its tokenizer from a folder or the Hub, sharded where several processes train together.

    Raises:
        ConfigError: there is no such model, it names no EOS or has no chat template, or LoRA does not fit it.
    """
    dtype = getattr(torch, config.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision or "main")
        set_chat_template(tokenizer, config.chat_template)
        model = load_merged(config.path, config.revision, dtype)
        ids = eos_token_ids(model, tokenizer)
        if model.generation_config is not None:
            model.generation_config.eos_token_id = list(ids)  # whoever serves a checkpoint must stop there too
        if config.lora:
            _add_adapter(model, config.lora, config.path, config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {config.path!r}: {str(error).splitlines()[0]}") from error
    model.to(distributed.local_device(config.device))  # pyright: ignore[reportArgumentType]
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if distributed.world_size() > 1:
        distributed.shard(model, set(model._no_split_modules or ()), dtype)
    return Student(model, tokenizer, ids, turn_end_id(tokenizer), dtype)


def load_merged(path: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model at `path`; an adapter's folder gives its base model with the adapter added to the weights.

    Raises:
        OSError, ValueError: there is no such model.
    """
    adapter = Path(path) / ADAPTER_FILE
    if not adapter.is_file():
        return AutoModelForCausalLM.from_pretrained(path, revision=revision or "main", dtype=dtype)
    from peft import PeftModel

    described: dict[str, Any] = json.loads(adapter.read_text())
    base = AutoModelForCausalLM.from_pretrained(
        described["base_model_name_or_path"], revision=described.get("revision") or "main", dtype=dtype
    )
    merged: Any = PeftModel.from_pretrained(base, path).merge_and_unload()  # pyright: ignore[reportCallIssue]
    return merged


def _add_adapter(model: PreTrainedModel, config: LoraConfig, path: str, revision: str | None) -> None:
    """Freezes the model and puts a fresh adapter into it: A random, the same for every run, and B 0."""
    from peft import LoraConfig as PeftLoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(0, ADAPTER, config.rank))
        model.add_adapter(
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                revision=revision,
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=config.dropout,
                target_modules=list(config.target_modules) or "all-linear",
            )
        )
    # An adapter's folder must find its base from wherever it is loaded.
    base = str(Path(path).resolve()) if Path(path).is_dir() else path
    model.peft_config["default"].base_model_name_or_path = base  # pyright: ignore[reportAttributeAccessIssue]
