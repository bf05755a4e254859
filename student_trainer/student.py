"""The student: its weights, its tokenizer, and what a teacher must share with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from protos.fingerprint import tokenizer_fingerprint
from protos.records import TokenizerFingerprint
from student_trainer.config import ConfigError, ModelConfig
from student_trainer.lm_head import LmHead, find_head
from student_trainer.text import eos_token_ids


@dataclass(frozen=True)
class Student:
    """A model in training; `eos_token_ids` end its completions."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]

    @cached_property
    def head(self) -> LmHead:
        """From hidden states to logits; see `find_head`."""
        return find_head(self.model)

    @property
    def vocab_size(self) -> int:
        """V, the width of the model's output."""
        return int(self.model.config.vocab_size)

    @property
    def fingerprint(self) -> TokenizerFingerprint:
        """What a teacher must share."""
        return tokenizer_fingerprint(self.tokenizer, eos_token_ids=self.eos_token_ids, vocab_size=self.vocab_size)


def load_student(config: ModelConfig) -> Student:
    """Loads the model and its tokenizer from a folder or the Hub.

    Raises:
        ConfigError: there is no such model, it names no EOS, or its logits cannot be computed by chunks.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config.path, revision=config.revision or "main", dtype=getattr(torch, config.dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision or "main")
        model.to(_device(config))  # pyright: ignore[reportArgumentType]
        student = Student(model, tokenizer, eos_token_ids(model, tokenizer))
        _ = student.head  # found at load, so that a model that has none is refused here
        return student
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {config.path!r}: {str(error).splitlines()[0]}") from error


def load_backbone(config: ModelConfig) -> PreTrainedModel:
    """The model without its LM head, in float32."""
    model: PreTrainedModel = AutoModel.from_pretrained(
        config.path, revision=config.revision or "main", dtype=torch.float32
    )
    return model.to(_device(config))  # pyright: ignore[reportArgumentType]


def _device(config: ModelConfig) -> torch.device:
    is_auto = config.device == "auto"
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if is_auto else config.device)
