"""The K largest values of each row, in order: torch's kernel on a GPU, and on a CPU a faster one of our own.

Shape letters: R rows, V values of a row, K wanted.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 32
"""Values of which only the maximum is looked at first: 32 was as fast as 64 or faster at K = 20, 64 and 256, for rows
of 300 to 150,000 values."""


def largest(values_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest float32 values of each row, descending, [R, K], and their places, int64 [R, K]; K is at most V.

    The same values as `torch.topk`, which on a CPU selects among pairs of value and place and takes two to five times
    as long.
    """
    if k == 0 or not values_RV.is_cpu:
        top_RK, places_RK = values_RV.topk(k)
        return top_RK, places_RK
    places_RK = _places(values_RV, k)
    return values_RV.gather(1, places_RK), places_RK


def _places(values_RV: torch.Tensor, k: int) -> torch.Tensor:
    """Of a long row only the K blocks with the largest maxima are sorted, and the rest that fills no block.

    A value in any other block is at most its block's maximum, and so at most each of K values in those.
    """
    num_values = values_RV.shape[1]
    num_blocks = num_values // BLOCK
    if num_blocks <= 2 * k:  # too few would be left out
        return _sorted_places(values_RV, k)
    maxima = values_RV[:, : num_blocks * BLOCK].unflatten(1, (num_blocks, BLOCK)).amax(-1)
    in_blocks = (_places(maxima, k).unsqueeze(-1) * BLOCK + torch.arange(BLOCK)).flatten(1)
    behind = torch.arange(num_blocks * BLOCK, num_values).expand(len(values_RV), -1)
    candidates = torch.cat([in_blocks, behind], dim=1)
    return candidates.gather(1, _sorted_places(values_RV.gather(1, candidates), k))


def _sorted_places(values_RV: torch.Tensor, k: int) -> torch.Tensor:
    """The places by way of one int64 key for each value, which NumPy partitions with vector instructions.

    A key holds the value above and its place below. The bits of a positive float grow with it and those of a negative
    one fall: they are turned so that the largest value has the smallest key. Of equal values the first comes first.
    """
    bits = values_RV.numpy().view(np.int32)
    keys = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).astype(np.int64)
    keys <<= 32
    keys |= np.arange(values_RV.shape[1])
    keys.partition(k - 1)
    return torch.from_numpy(np.sort(keys[:, :k]) & 0xFFFFFFFF)
