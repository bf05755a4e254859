"""From logits to log-probs: the one place where the temperature and the precision of the softmax are decided."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_probs(logits_BTV: Tensor, temperature: float) -> Tensor:
    """log_softmax(logits / temperature) over the last dimension, in nats.

    Half precision is widened to float32 before the division; float32 and float64 keep their type.

    Raises:
        ValueError: the temperature is not a finite number above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)
