"""Log-probs that the tests compute themselves, from one plain forward over a whole text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def plain_model(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()


def logprobs_TV(
    model: Any,
    context_ids: Sequence[int] | np.ndarray,
    completion_ids: Sequence[int] | np.ndarray,
    temperature: float = 1.0,
) -> np.ndarray:
    """float64 [T, V]: log_softmax(logits / T); position C - 1 + t of the text predicts completion token t."""
    text = torch.tensor([[*context_ids, *completion_ids]])
    with torch.inference_mode():
        logits_TV = model(text).logits[0, len(context_ids) - 1 : -1].double()
    return torch.log_softmax(logits_TV / temperature, -1).numpy()


def sampled_logprobs(
    model: Any, context_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray
) -> np.ndarray:
    """float64 [T]: log_softmax(logits)[id] of each completion id."""
    return logprobs_TV(model, context_ids, completion_ids)[np.arange(len(completion_ids)), completion_ids]
