"""From values per token to metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from student_trainer.losses.pairing import check_same_shape


def token_means(values: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, float]:
    """The mean of each [B, T] array over the response tokens, all in one pass; what the mask leaves out is not read.

    Raises:
        ValueError: an array has another shape than the mask, or there is no response token.
    """
    check_same_shape(mask_BT=mask_BT, **dict(values))
    num_tokens = int(mask_BT.sum())
    if num_tokens < 1:
        raise ValueError(f"a mean over {num_tokens} tokens does not exist")
    stacked_MBT = torch.stack([value_BT.detach().float() for value_BT in values.values()])
    sums_M = torch.where(mask_BT, stacked_MBT, 0.0).sum((-2, -1), dtype=torch.float64)
    return dict(zip(values, (sums_M / num_tokens).tolist(), strict=True))
