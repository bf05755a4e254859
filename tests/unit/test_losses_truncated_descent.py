"""Where gradient descent on each truncated loss ends, with the support fixed."""

import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import log_probs, teacher_support
from tests.truncated_losses import LOSSES, tensor

Q5 = [0.4, 0.3, 0.15, 0.1, 0.05]
FIXED = [0, 1, 3]
"""Ids of the support in the descents: Q = 0.8."""


def descend(name: str, *, rate: float = 4.0, num_steps: int = 700) -> Tensor:
    """p after gradient descent on the logits, with the support fixed: [5]."""
    logq = tensor(Q5).log()
    z = tensor([0.0, -1.0, 1.0, 0.5, 2.0]).requires_grad_()
    support = teacher_support(torch.tensor([[FIXED]]))
    for _ in range(num_steps):
        (gradient,) = torch.autograd.grad(LOSSES[name](log_probs(z, 1.0), logq, support).sum(), z)
        with torch.no_grad():
            z -= rate * gradient
    return log_probs(z, 1.0).exp().detach()[0, 0]


@pytest.mark.parametrize("name", ["stop_gradient", "tail_reverse", "tail_forward"])
def test_descent_stops_at_p_equal_q_on_the_support(name: str) -> None:
    p = descend(name)
    assert p[FIXED].tolist() == pytest.approx([0.4, 0.3, 0.1], abs=1e-12)
    # P = Q = 0.8. Off the support only the total is calibrated: p = q would need 0.15 and 0.05 there.
    assert p[[2, 4]].sum().item() == pytest.approx(0.2, abs=1e-12)
    assert abs(p[4].item() - 0.05) > 0.04


def test_descent_of_the_unnormalised_loss_leaks_mass_until_a_share_of_1_in_e_is_left() -> None:
    p = descend("biased")
    assert p[FIXED].tolist() == pytest.approx([0.4 / math.e, 0.3 / math.e, 0.1 / math.e], abs=1e-12)
    loss = LOSSES["biased"](p.log()[None, None], tensor(Q5).log(), teacher_support(torch.tensor([[FIXED]])))
    assert loss.item() == pytest.approx(-0.8 / math.e, abs=1e-12)


@pytest.mark.parametrize("name", ["renormalised_reverse", "renormalised_forward"])
def test_descent_of_a_renormalised_loss_leaves_the_mass_and_what_is_outside_alone(name: str) -> None:
    p = descend(name)
    assert (p[FIXED] / p[FIXED].sum()).tolist() == pytest.approx([4 / 8, 3 / 8, 1 / 8], abs=1e-12)
    # Logits of ids 2 and 4 began 1 apart and got no gradient: the ratio of their probabilities is e still.
    assert (p[4] / p[2]).item() == pytest.approx(math.e, abs=1e-9)
    assert abs(p[FIXED].sum().item() - 0.8) > 0.1
