import math

import pytest
import torch

from student_trainer.losses import token_mean
from student_trainer.losses.policy import (
    STD_EPS,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    group_advantages,
    is_clipped,
    reference_kl,
    whiten,
)

F64 = torch.float64
NAN = math.nan
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=F64)


def everywhere(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


def gradient(loss_BT: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss_BT.sum(), of)[0]


def test_advantages_are_relative_to_the_group():
    """Rewards 1, 0, 0, 1: mean 1/2, sample variance 4 (1/4) / 3, so A = ± (1/2) / (sqrt(1/3) + eps)."""
    advantage = group_advantages(row(1, 0, 0, 1))
    size = 0.5 / (math.sqrt(1 / 3) + STD_EPS)
    torch.testing.assert_close(advantage, row(size, -size, -size, size), atol=1e-15, rtol=0)
    torch.testing.assert_close(group_advantages(row(1, 0, 0, 1), divide_by_std=False), row(0.5, -0.5, -0.5, 0.5))


def test_without_the_division_a_group_weighs_by_how_far_its_rewards_are_apart():
    groups = torch.cat([row(0, 1), row(0, 0.1)])
    plain, scaled = group_advantages(groups, divide_by_std=False), group_advantages(groups)
    assert float(plain[0, 1] / plain[1, 1]) == pytest.approx(10)
    # std = |difference| / sqrt 2, so both are 1 / sqrt 2 but for eps.
    torch.testing.assert_close(scaled[:, 1], torch.full((2,), 1 / math.sqrt(2), dtype=F64), atol=2e-3, rtol=0)


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_equal_rewards_give_exactly_zero(divide_by_std):
    """Also where their mean rounds: in float32 the mean of seven times 0.1 is not 0.1."""
    equal = torch.full((3, 7), 0.1)
    equal[1], equal[2] = 0.0, 1.0
    assert torch.equal(group_advantages(equal, divide_by_std=divide_by_std), torch.zeros(3, 7))


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples a problem, got 1"):
        group_advantages(torch.ones(4, 1))


def test_the_surrogate_and_its_gradient_in_each_of_its_regions():
    """Ratios 0.5, 1, 1.5 with A = 2 and A = -2: clipped are only 1.5 pushed up further and 0.5 pushed down further."""
    ratio = row(0.5, 1.0, 1.5, 0.5, 1.0, 1.5)
    advantage = row(2, 2, 2, -2, -2, -2)
    old = row(-1, -2, -3, -0.5, -1.5, -2.5)
    logp = (old + ratio.log()).requires_grad_()
    loss = clipped_surrogate(logp, old, advantage, everywhere(old), **CLIP)
    expected = row(-2 * 0.5, -2 * 1, -2 * 1.28, 2 * 0.8, 2 * 1, 2 * 1.5)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-14, rtol=0)
    # dL/dlog p = -w A, and 0 where clipped.
    torch.testing.assert_close(gradient(loss, logp), row(-1, -2, 0, 0, 2, 3), atol=1e-14, rtol=0)
    assert is_clipped(logp, old, advantage, **CLIP).tolist() == [[False, False, True, True, False, False]]


def test_on_policy_the_surrogate_is_the_policy_gradient():
    """At w = 1 the gradient of the token mean with respect to the logits is mean A (p - onehot)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=F64, requires_grad=True)
    ids = torch.randint(5, (2, 3), generator=generator)
    advantage = torch.randn(2, 3, generator=generator, dtype=F64)
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss = token_mean(clipped_surrogate(logp, logp.detach(), advantage, everywhere(ids), **CLIP), everywhere(ids))
    onehot = torch.nn.functional.one_hot(ids, 5)
    expected = advantage[..., None] * (logits.detach().softmax(-1) - onehot) / 6
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, atol=1e-15, rtol=0)


def test_k3_and_its_gradient():
    """log p_ref / p = -0.3, 0, 0.4: k3 = e^x - 1 - x, dk3/dlog p = 1 - e^x."""
    x = row(-0.3, 0.0, 0.4)
    reference = row(-1, -2, -3)
    logp = (reference - x).requires_grad_()
    loss = reference_kl(logp, reference, everywhere(x))
    torch.testing.assert_close(loss.detach(), x.exp() - 1 - x, atol=1e-15, rtol=0)
    torch.testing.assert_close(gradient(loss, logp), 1 - x.exp(), atol=1e-15, rtol=0)


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """The exact expectation over the vocabulary: sum_v p k3_v = KL(p || p_ref)."""
    p, q = row(0.7, 0.2, 0.1), row(0.3, 0.3, 0.4)
    expectation = (p * reference_kl(p.log(), q.log(), everywhere(p))).sum()
    assert float(expectation) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-15)


def test_what_the_mask_leaves_out_has_no_value_and_no_gradient_whatever_it_holds():
    mask = torch.tensor([[True, True, False]])
    given = row(-1, -2, NAN)
    for loss_of in (
        lambda x: clipped_surrogate(x, given, row(1, -1, NAN), mask, **CLIP),
        lambda x: reference_kl(x, given, mask),
        lambda x: clipped_value_loss(x, given, given, mask, clip=0.2),
    ):
        student = row(-1.1, -1.9, -50).requires_grad_()
        loss = loss_of(student)
        grad = gradient(loss, student)
        assert float(loss[0, 2].detach()) == 0
        assert float(grad[0, 2]) == 0
        assert grad.isfinite().all()
        assert (grad[0, :2] != 0).all()


def test_a_missing_log_prob_is_refused_by_name():
    mask = torch.tensor([[True, True]])
    with pytest.raises(ValueError, match=r"1 of 2 old log-probs are missing \(NaN\), the first at \(0, 1\)"):
        clipped_surrogate(row(-1, -1), row(-1, NAN), row(1, 1), mask, **CLIP)
    with pytest.raises(ValueError, match=r"1 of 2 reference log-probs are missing"):
        reference_kl(row(-1, -1), row(NAN, -1), mask)


def test_gae_by_hand():
    """V = 1/2, 1/4, 1; r = 0, 0, 2; gamma = 1/2, lambda = 1/2.

    delta = [1/8 - 1/2, 1/2 - 1/4, 2 - 1] = [-3/8, 1/4, 1]; A_2 = 1, A_1 = 1/4 + 1/4, A_0 = -3/8 + 1/2 / 4 = -1/4.
    """
    value, reward = row(0.5, 0.25, 1), row(0, 0, 2)
    advantage = gae(reward, value, everywhere(value), gamma=0.5, gae_lambda=0.5)
    assert advantage.tolist() == [[-0.25, 0.5, 1.0]]


def test_gae_is_the_discounted_sum_of_its_deltas_in_every_sequence_of_a_batch():
    generator = torch.Generator().manual_seed(1)
    lengths, gamma, lam = [4, 1, 7, 3], 0.9, 0.8
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    reward, value = torch.randn(2, 4, 7, generator=generator, dtype=F64).masked_fill(~mask, NAN)
    advantage = gae(reward, value, mask, gamma=gamma, gae_lambda=lam)
    assert torch.equal(advantage[~mask], torch.zeros(13, dtype=F64))
    for b, length in enumerate(lengths):
        v, r = [*value[b, :length].tolist(), 0.0], reward[b, :length].tolist()
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        assert advantage[b, :length].tolist() == pytest.approx(expected, abs=1e-12)


def test_gae_at_lambda_one_is_the_return_minus_the_value_and_at_zero_the_delta():
    value, reward = row(0.3, -0.2, 0.5, 0.1), row(0, 1, 0, 2)
    one = gae(reward, value, everywhere(value), gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(one, row(3, 3, 2, 2) - value, atol=1e-15, rtol=0)
    zero = gae(reward, value, everywhere(value), gamma=1.0, gae_lambda=0.0)
    torch.testing.assert_close(zero, reward + row(-0.2, 0.5, 0.1, 0) - value, atol=1e-15, rtol=0)


def test_gae_steps_over_tokens_that_do_not_count():
    mask = torch.tensor([[True, False, True]])
    with_gap = gae(row(1, NAN, 2), row(0.5, NAN, 0.25), mask, gamma=0.9, gae_lambda=0.5)
    without = gae(row(1, 2), row(0.5, 0.25), everywhere(row(1, 2)), gamma=0.9, gae_lambda=0.5)
    assert with_gap[:, [0, 2]].tolist() == without.tolist()


def test_whitened_advantages_have_mean_zero_and_unit_deviation_over_the_tokens_that_count():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    white = whiten(torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]], dtype=F64), mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-15)
    # The deviation of 1 .. 5 is sqrt 2; eps is added to it.
    assert float(white[mask].std(correction=0)) == pytest.approx(math.sqrt(2) / (math.sqrt(2) + STD_EPS), abs=1e-12)
    assert float(white[0, 2]) == 0
    assert torch.equal(whiten(torch.full((1, 2), 3.0), torch.ones(1, 2, dtype=torch.bool)), torch.zeros(1, 2))


def test_the_value_loss_and_its_gradient_in_each_of_its_regions():
    """V_old = 0, clip 0.2. V = 0.1 is inside; 1 has left towards R = 2 (clipped error 1.8 > 1); 1 away from R = -1."""
    value = row(0.1, 1, 1).requires_grad_()
    target = row(2, 2, -1)
    loss = clipped_value_loss(value, torch.zeros_like(target), target, everywhere(target), clip=0.2)
    torch.testing.assert_close(loss.detach(), row(1.9**2 / 2, 1.8**2 / 2, 2**2 / 2), atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient(loss, value), row(-1.9, 0, 2), atol=1e-14, rtol=0)
