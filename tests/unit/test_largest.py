"""The K largest of a row against torch.topk, which is exact."""

from __future__ import annotations

import pytest
import torch

from teacher_server.engines.largest import BLOCK, largest


@pytest.mark.parametrize(
    ("num_values", "k"),
    [
        (1, 1),
        (50, 20),
        (50, 50),
        (304, 64),
        (3 * BLOCK, 1),  # one block of three
        (5000, 20),  # 156 blocks and 8 values behind them
        (151_936, 64),  # blocks of blocks: 4,748 maxima, then 148 of theirs
    ],
)
@pytest.mark.parametrize("kind", ["distinct", "equal", "negative", "impossible"])
def test_they_are_those_of_topk(num_values: int, k: int, kind: str) -> None:
    values = torch.randn(5, num_values, generator=torch.Generator().manual_seed(k)) * 4
    if kind == "equal":
        values = values.round()  # about 30 different ones, 0.0 and -0.0 among them
    if kind == "negative":
        values = -values.abs() - 1000
    if kind == "impossible":
        values[:, num_values // 2 :] = -torch.inf
    top, places = largest(values, k)
    assert torch.equal(top, values.topk(k).values)
    assert torch.equal(top, values.gather(1, places))
    assert all(len(set(row)) == k for row in places.tolist())


def test_rows_may_lie_apart_in_memory() -> None:
    """As logits do whose padding to a wider vocabulary is left out: the padding is never among the largest."""
    padded = torch.full((4, 512), 100.0)
    padded[:, :500] = torch.randn(4, 500)
    top, _ = largest(padded[:, :500], 3)
    assert torch.equal(top, padded[:, :500].topk(3).values)
