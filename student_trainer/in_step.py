"""What ranks do in step with one batch: an update's micro-batches and its tokens, and work that each does a share of.

Sharded weights are gathered by all ranks at once, so each must take as many forward and backward passes as the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from student_trainer import distributed
from student_trainer.collate import Batch


def num_tokens_of_all(batch: Batch) -> int:
    """Completion tokens of the ranks' batches together: the denominator of an update's token mean."""
    return int(distributed.sums({"tokens": batch.num_tokens})["tokens"])


def micro_batches(batch: Batch, num_sequences: int, device: torch.device) -> Iterator[Batch]:
    """Micro-batches of at most `num_sequences` on `device`; idle ones for a rank that has fewer than another."""
    micros = list(batch.split(num_sequences))
    idle = [micros[0].idle()] * (max(distributed.gather(len(micros))) - len(micros))
    for micro in (*micros, *idle):
        yield micro.to(device)


def by_shares(of_batch: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
    """`of_batch(batch)`, [B, T], of a batch that all ranks have: each computes it for its share of the sequences.

    Args:
        of_batch: from b sequences to float32 [b, their longest completion] on the CPU.
    """
    mine, width = batch.share(), batch.mask_BT.shape[1]

    def padded() -> torch.Tensor:
        value_BT = of_batch(mine) if mine.num_sequences else torch.empty((0, width))
        return F.pad(value_BT, (0, width - value_BT.shape[1]), value=math.nan)

    return torch.cat(distributed.gather(distributed.agreed(padded)))
