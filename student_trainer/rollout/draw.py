"""Which token comes next: a draw from each row's distribution by random numbers of that row alone.

The numbers of a row are a function of its own seed, so a problem and a seed give the same completion alone, in any
batch and on any rank, up to the rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from student_trainer.rollout.base import SamplingParams

DRAWS_PER_TOKEN = 2
"""One number picks a block of the vocabulary, the other an id in it."""

LARGEST_UNIFORM = 1 - 2**-52
"""Times a float64 it rounds to less than that; 1 - 2**-53, which a stream has as well, does not always."""


def streams(seeds: Sequence[int], num_samples: int, num_tokens: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [len(seeds) * num_samples, num_tokens, DRAWS_PER_TOKEN], grouped by seed.

    Counter-based: Philox 4x64 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"). A longer stream
    starts with the shorter one.
    """
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(sample,))))
        for seed in seeds
        for sample in range(num_samples)
    ]
    return torch.from_numpy(np.stack([row.random((num_tokens, DRAWS_PER_TOKEN)) for row in rows]))


def draw(logp_BV: torch.Tensor, params: SamplingParams, uniform_B2: torch.Tensor) -> torch.Tensor:
    """One id a row, int64 [B]: greedy at temperature 0, else from the nucleus of `logp_BV` (already at temperature).

    By inversion of the distribution function in two steps: first a block of about sqrt(V) ids by the blocks' masses,
    then an id by its share of the block. In one step, the rounding of 10^5 partial sums would move the choice among
    rare ids as often as one of them is drawn. Where log-probs are NaN, so is that of the id drawn.
    """
    if params.temperature == 0:
        return logp_BV.argmax(-1)
    vocab_size = logp_BV.shape[-1]
    width = int(vocab_size**0.5)
    probs_BV = F.pad(logp_BV, (0, -vocab_size % width), value=-torch.inf).exp_()
    if params.top_p < 1:
        probs_BV = nucleus(probs_BV, params.top_p)
    blocks_BNW = probs_BV.unflatten(-1, (-1, width))
    block_uniform_B1, id_uniform_B1 = uniform_B2.clamp_max(LARGEST_UNIFORM).split(1, -1)
    block_B1 = _invert(blocks_BNW.sum(-1), block_uniform_B1)
    block_BW = blocks_BNW.gather(1, block_B1[..., None].expand(-1, -1, width))[:, 0]
    return (block_B1 * width + _invert(block_BW, id_uniform_B1))[:, 0].clamp_max(vocab_size - 1)


def nucleus(probs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """`probs_BV` with 0 outside the fewest most likely ids that reach `top_p` (Holtzman et al., arXiv:1904.09751)."""
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
    outside_BV[:, 0] = False  # a top_p below float32's smallest number compares as 0
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0))


def _invert(mass_BN: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """The entry n of each row with F(n - 1) <= u < F(n), F the distribution function of `mass_BN`, int64 [B, 1]; one
    without mass is never taken."""
    cdf_BN = mass_BN.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_BN, uniform_B1 * cdf_BN[:, -1:], right=True).clamp_max(mass_BN.shape[-1] - 1)
