import pytest
import torch
from torch import nn

from student_trainer.masters import MasterWeights


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    """A unit in the last place of bfloat16 at 1 is 2^-7 (below 1: 2^-8), so 1 - 1e-3 rounds back to 1, but 8 such steps
    are 1 - 8e-3, whose nearest bfloat16 is 1 - 2^-7 = 0.9921875."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    layer.weight.data.fill_(1)
    weights = MasterWeights(layer)
    optimizer = torch.optim.SGD(weights.named.values(), lr=1e-3)
    seen = []
    for _ in range(8):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.publish()
        seen.append(layer.weight.item())
    assert seen[0] == 1
    assert weights.named["weight"].item() == pytest.approx(0.992, abs=1e-6)
    assert seen[-1] == 0.9921875
    assert layer.weight.grad is None


def test_gradients_accumulate_in_float32():
    """1 + 2^-9 + 2^-9 is 1.00390625; in bfloat16, whose next number after 1 is 1 + 2^-7, every addition is lost."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    weights = MasterWeights(layer)
    for gradient in (1, 2**-9, 2**-9):
        layer(torch.full((1, 1), gradient, dtype=torch.bfloat16)).sum().backward()
    grad = weights.named["weight"].grad
    assert grad is not None
    assert grad.item() == 1 + 2**-8


def test_float32_weights_are_their_own_masters_and_frozen_ones_have_none():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    weights = MasterWeights(model)
    assert list(weights.named) == ["0.weight", "0.bias"]
    assert weights.named["0.weight"] is model[0].weight
