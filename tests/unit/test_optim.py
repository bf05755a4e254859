import math

import pytest
import torch

from student_trainer.config import OptimConfig
from student_trainer.optim import build_optimizer, lr_share


def test_warm_up_rises_linearly_and_cosine_falls_to_the_final_share():
    """S = 11, W = 3: 1/3, 2/3, 1; then step 3 is the top and step 10 the end."""
    config = OptimConfig(warmup_steps=3, final_lr_share=0.1)
    shares = [lr_share(step, 11, config) for step in range(11)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert shares[3] == pytest.approx(1)
    assert shares[10] == pytest.approx(0.1)
    assert shares[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 7)) / 2)
    assert shares[3:] == sorted(shares[3:], reverse=True)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert lr_share(0, 1, OptimConfig(warmup_steps=0)) == 1


def test_a_run_shorter_than_its_warm_up_is_the_start_of_a_longer_one():
    config = OptimConfig(warmup_steps=20)
    assert [lr_share(s, 10, config) for s in range(10)] == [lr_share(s, 300, config) for s in range(10)]


def test_weight_decay_spares_vectors():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([matrix, vector], OptimConfig(lr=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.1 * 0.5))
