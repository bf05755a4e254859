"""Sampled-token losses: expectations over y ~ p are sums over the vocabulary, so they are exact."""

import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import importance_weights, k2, k3, log_probs, policy_gradient

VOCAB = 5
LOSSES = [policy_gradient, k2, k3]
EVERY = torch.ones(1, VOCAB, dtype=torch.bool)


def expected_gradient(loss, z: Tensor, logq: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_y p(y) d loss(y) / dz of one position, z [V], p a constant; `weight` [V] takes the place of p."""
    logp = log_probs(z, 1.0)
    weight = logp.detach().exp() if weight is None else weight
    value = loss(logp[None], logq[None], EVERY)[0]
    return torch.autograd.grad((weight * value).sum(), z)[0]


def pair(seed: int) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student.requires_grad_(), log_probs(teacher, 1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_expected_gradients_are_those_of_the_divergences(seed: int) -> None:
    z, logq = pair(seed)
    p = log_probs(z, 1.0).exp().detach()
    r = p.log() - logq
    reverse, forward = p * (r - (p * r).sum()), p - logq.exp()
    torch.testing.assert_close(expected_gradient(policy_gradient, z, logq), reverse, rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient(k2, z, logq), reverse, rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient(k3, z, logq), forward, rtol=0, atol=1e-15)


def test_k1_as_a_loss_and_an_advantage_of_the_state_have_no_expected_gradient() -> None:
    """Why both are refused."""
    z, logq = pair(0)
    k1 = expected_gradient(lambda logp, logq, _: logp - logq, z, logq)
    torch.testing.assert_close(k1, torch.zeros_like(k1), rtol=0, atol=1e-15)
    state = expected_gradient(lambda logp, logq, _: 3.7 * logp, z, logq)
    torch.testing.assert_close(state, torch.zeros_like(state), rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_one_token_by_hand(loss) -> None:
    # d log p_y / dz_j = 1[j = y] - p_j, times r, r and 1 - q/p. Here p = [1/4, 3/4], q = [1/2, 1/2] and y = 0:
    # r = -ln 2, 1 - q/p = -1, d log p_y / dz = [3/4, -3/4].
    z = torch.tensor([0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    value = loss(log_probs(z, 1.0)[None, :1], torch.tensor([[0.5]], dtype=torch.float64).log(), EVERY[:, :1])
    (gradient,) = torch.autograd.grad(value.sum(), z)
    r = -math.log(2)
    factor = -1.0 if loss is k3 else r
    assert gradient.tolist() == pytest.approx([0.75 * factor, -0.75 * factor], abs=1e-15)
    assert value.item() == pytest.approx({policy_gradient: r, k2: r * r / 2, k3: 2 - 1 + r}[loss], abs=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_in_expectation_stops_at_the_teacher(loss) -> None:
    z, logq = pair(0)
    for _ in range(600):
        gradient = expected_gradient(loss, z, logq)
        with torch.no_grad():
            z -= 2 * gradient
    torch.testing.assert_close(log_probs(z, 1.0), logq, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_equal_to_the_student_gives_zero_to_the_bit(loss, dtype: torch.dtype) -> None:
    z = (4 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    logp = log_probs(z, 0.7)[..., 0]
    value = loss(logp, logp.detach(), torch.ones(2, 3, dtype=torch.bool))
    assert value.dtype == torch.float32
    assert (value == 0).all()
    assert (torch.autograd.grad(value.sum(), z)[0] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_the_mask_leaves_out_counts_for_nothing(loss, junk: float) -> None:
    logp = torch.tensor([[-1.0, junk]], requires_grad=True)
    value = loss(logp, torch.tensor([[-2.0, junk]]), torch.tensor([[True, False]]))
    assert value[0, 1].item() == 0
    # r = 1: the gradients with respect to log p are r, r and 1 - 1/e.
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    assert gradient.tolist() == [[pytest.approx(1 - math.exp(-1) if loss is k3 else 1.0), 0.0]]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_missing_teacher_log_prob_and_another_shape_are_refused_and_the_teacher_is_a_constant(loss) -> None:
    logp, logq = torch.zeros(1, 2, requires_grad=True), torch.tensor([[-1.0, math.nan]], requires_grad=True)
    with pytest.raises(ValueError, match=r"1 of 2 teacher log-probs are missing \(NaN\), the first at \(0, 1\)"):
        loss(logp, logq, torch.tensor([[True, True]]))
    with pytest.raises(ValueError, match=r"teacher_logp_BT has shape \(1, 1\)"):
        loss(logp, logq[:, :1], torch.tensor([[True, True]]))
    loss(logp, logq, torch.tensor([[True, False]])).sum().backward()
    assert logq.grad is None


def test_importance_weights_restore_the_expectation_under_another_distribution() -> None:
    z, logq = pair(0)
    logmu = pair(1)[1]
    logp = log_probs(z, 1.0)
    w = importance_weights(logp[None], logmu[None], "truncated", 1e9)[0]
    weighted = expected_gradient(policy_gradient, z, logq, logmu.exp() * w)
    torch.testing.assert_close(weighted, expected_gradient(policy_gradient, z, logq), rtol=0, atol=1e-15)
    assert not w.requires_grad


def test_importance_weights_are_truncated_above_or_clipped_on_both_sides() -> None:
    # p / mu = 8, 3/2, 1/8.
    logp = torch.tensor([[0.8, 0.3, 0.1]]).log()
    logmu = torch.tensor([[0.1, 0.2, 0.8]]).log()
    assert importance_weights(logp, logmu, "truncated", 2.0)[0].tolist() == pytest.approx([2.0, 1.5, 0.125])
    assert importance_weights(logp, logmu, "clipped", 2.0)[0].tolist() == pytest.approx([2.0, 1.5, 0.5])
    assert importance_weights(logp, torch.full((1, 3), math.nan), "clipped", 2.0).isnan().all()
    with pytest.raises(ValueError, match=r"must be at least 1, got 0\.5"):
        importance_weights(logp, logmu, "clipped", 0.5)
    with pytest.raises(ValueError, match="behaviour_logp_BT has shape"):
        importance_weights(logp, logmu[:, :1], "clipped", 2.0)
