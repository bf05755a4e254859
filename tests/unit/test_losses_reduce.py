import math

import pytest
import torch

from student_trainer.losses import (
    align,
    forward_kl,
    full_vocabulary,
    gather,
    log_probs,
    reverse_kl,
    stop_gradient_reverse_kl,
    token_mean,
    union_support,
)

# Four completions of 5, 1, 3 and 2 tokens: 11 in all.
MASK = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])


def test_every_token_weighs_the_same() -> None:
    # (1 + 2 + 3) / 3 = 2; a mean of the two completions' means would be (3/2 + 3) / 2 = 9/4.
    loss = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    assert token_mean(loss, torch.tensor([[True, True], [True, False]])).item() == 2.0


def test_num_tokens_is_the_denominator() -> None:
    # (1 + 2) / 8
    assert token_mean(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]), num_tokens=8).item() == 0.375


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_the_mask_leaves_out_leaks_neither_value_nor_gradient(junk: float) -> None:
    loss = torch.tensor([[1.0, junk]], requires_grad=True)
    mean = token_mean(loss, torch.tensor([[True, False]]))
    assert mean.item() == 1.0
    (gradient,) = torch.autograd.grad(mean, loss)
    assert gradient.tolist() == [[1.0, 0.0]]


def test_a_nan_on_a_completion_token_is_not_hidden() -> None:
    assert token_mean(torch.tensor([[1.0, math.nan]]), torch.tensor([[True, True]])).isnan()


def test_a_step_without_tokens_has_no_mean_but_a_micro_batch_without_tokens_adds_nothing() -> None:
    loss, mask = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="a mean over 0 tokens"):
        token_mean(loss, mask)
    mean = token_mean(loss, mask, num_tokens=5)
    assert mean.item() == 0
    assert torch.autograd.grad(mean, loss)[0].tolist() == [[0.0, 0.0]]


def test_a_denominator_smaller_than_the_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_tokens is 10, but this batch alone has 11 completion tokens"):
        token_mean(torch.zeros(4, 5), MASK, num_tokens=10)


def test_the_mask_is_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"mask_BT has shape \(1, 5\)"):
        token_mean(torch.zeros(4, 5), MASK[:1])


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
@pytest.mark.parametrize("splits", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_accumulated_micro_batches_equal_the_whole_batch(divergence, splits: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    logq = log_probs(teacher, 1.0)
    whole = token_mean(divergence(log_probs(z, 1.0), logq), MASK)
    (whole_gradient,) = torch.autograd.grad(whole, z)

    parts = [
        token_mean(divergence(log_probs(z_part, 1.0), logq_part), mask_part, num_tokens=11)
        for z_part, logq_part, mask_part in zip(z.split(splits), logq.split(splits), MASK.split(splits), strict=True)
    ]
    gradient = torch.stack([torch.autograd.grad(part, z)[0] for part in parts]).sum(0)
    assert torch.equal(gradient, whole_gradient)
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-15)


def test_padding_of_a_truncated_loss_does_not_change_loss_or_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    top_logp, top_ids = log_probs(teacher, 1.0).topk(3)
    top_ids = top_ids.masked_fill(~MASK[..., None], -1)
    top_logp = top_logp.masked_fill(~MASK[..., None], math.nan)
    candidate_ids = log_probs(z, 1.0).topk(3).indices.masked_fill(~MASK[..., None], -1)
    candidate_logp = log_probs(teacher, 1.0).gather(-1, candidate_ids.clamp(min=0))
    candidate_logp = candidate_logp.masked_fill(~MASK[..., None], math.nan)

    def loss_and_gradient(rows: slice, length: int) -> tuple[float, torch.Tensor]:
        z_part = z[rows, :length].clone().requires_grad_()
        ids = candidate_ids[rows, :length], top_ids[rows, :length]
        logps = candidate_logp[rows, :length], top_logp[rows, :length]
        support = union_support(*ids)
        aligned = align(support, ids[0], logps[0], ids[1], logps[1])
        loss = stop_gradient_reverse_kl(gather(log_probs(z_part, 1.0), support), aligned, support.mask_BTS)
        mean = token_mean(loss, MASK[rows, :length], num_tokens=11)
        return mean.item(), torch.autograd.grad(mean, z_part)[0]

    value, gradient = loss_and_gradient(slice(0, 4), 5)
    unpadded = [loss_and_gradient(slice(b, b + 1), length) for b, length in enumerate([5, 1, 3, 2])]
    assert value == pytest.approx(sum(part for part, _ in unpadded), abs=1e-15)
    for b, (_, part) in enumerate(unpadded):
        torch.testing.assert_close(gradient[b, : part.shape[1]], part[0], rtol=0, atol=1e-17)
        assert (gradient[b, part.shape[1] :] == 0).all()


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_padding_of_a_full_vocabulary_reply_leaks_neither_value_nor_gradient(divergence) -> None:
    # p uniform on 2 ids; q = [1/4, 3/4] on the one completion token. See test_losses_divergence for the numbers.
    z = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    top_logp = torch.tensor([[[0.75, 0.25], [math.nan, math.nan]]], dtype=torch.float64).log()
    mask = torch.tensor([[True, False]])
    logq = full_vocabulary(torch.tensor([[[1, 0], [-1, -1]]]), top_logp, mask)
    mean = token_mean(divergence(log_probs(z, 1.0), logq), mask)
    expected = {reverse_kl: math.log(4 / 3) / 2, forward_kl: 0.75 * math.log(3) - math.log(2)}[divergence]
    assert mean.item() == pytest.approx(expected, abs=1e-15)
    (gradient,) = torch.autograd.grad(mean, z)
    slope = {reverse_kl: math.log(3) / 4, forward_kl: 0.25}[divergence]
    assert gradient[0, 0].tolist() == pytest.approx([slope, -slope], abs=1e-15)
    assert gradient[0, 1].tolist() == [0.0, 0.0]
