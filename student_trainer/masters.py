"""Float32 master weights of a model that computes in half precision (Micikevicius et al. 2018, arXiv:1710.03740).

AdamW's steps are often smaller than half a unit in the last place of bfloat16 (2^-9 of the weight): added to the
model's own weights they would vanish.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn


class MasterWeights:
    """The weights that are trained, in float32; those that the model has in float32 are its own.

    Gradients go to the masters as soon as a backward pass has them, and accumulate there in float32.

    Attributes:
        named: by the model's names, what an optimiser steps; frozen weights are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named: dict[str, nn.Parameter] = {}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            self.named[name] = weight
            if weight.dtype != torch.float32:
                self.named[name] = master = nn.Parameter(weight.detach().float())
                self._pairs.append((weight, master))
                weight.register_post_accumulate_grad_hook(partial(_hand_over, master))

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model."""
        for weight, master in self._pairs:
            weight.copy_(master)


def _hand_over(master: nn.Parameter, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    gradient = weight.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    weight.grad = None
