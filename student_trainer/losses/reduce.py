"""From a loss per token to one number: which tokens count, and what the sum is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_same_shape


def token_mean(loss_BT: Tensor, mask_BT: Tensor, num_tokens: int | None = None) -> Tensor:
    """The sum of the loss over the completion tokens, divided by `num_tokens`: a scalar, in the loss's unit.

    The denominator is the number of completion tokens in the whole optimiser step, every micro-batch and rank
    together, so that gradients summed over them equal those of one big batch, and a token weighs the same in a short
    completion as in a long one. What the mask leaves out may hold NaN or inf: its gradient is 0.

    Args:
        loss_BT: loss per token.
        mask_BT: bool, true on completion tokens.
        num_tokens: completion tokens of the step; None when this batch is the whole step.

    Raises:
        ValueError: the shapes differ, there is no token, or the step has fewer tokens than this batch.
    """
    check_same_shape(loss_BT=loss_BT, mask_BT=mask_BT)
    batch_tokens = int(mask_BT.sum())
    denominator = batch_tokens if num_tokens is None else num_tokens
    if denominator < 1:
        raise ValueError(f"a mean over {denominator} tokens does not exist")
    if denominator < batch_tokens:
        raise ValueError(f"num_tokens is {denominator}, but this batch alone has {batch_tokens} completion tokens")
    return torch.where(mask_BT, loss_BT, 0.0).sum() / denominator
