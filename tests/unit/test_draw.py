import numpy as np
import pytest
import torch

from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.draw import DRAWS_PER_TOKEN, draw, streams

NUM_DRAWS = 40_000


def shares_of(probs, *, seed=0, **params):
    """How often each id comes up in NUM_DRAWS draws."""
    logp = torch.tensor(probs).log().expand(NUM_DRAWS, -1)
    uniform = streams([seed], 1, NUM_DRAWS)[0]
    ids = draw(logp, SamplingParams(max_new_tokens=1, **params), uniform)
    return ids.bincount(minlength=len(probs)) / NUM_DRAWS


def test_draws_follow_the_softmax():
    """500 ids in blocks of 22, the last of 16: each share within 5 standard errors, sqrt(p (1 - p) / n); of 500
    independent shares one is further out in about one run of 3,500."""
    p = (2 * torch.randn(500, generator=torch.Generator().manual_seed(3))).softmax(-1)
    error = (shares_of(p.tolist()) - p) / (p * (1 - p) / NUM_DRAWS).sqrt()
    assert error.abs().max() < 5
    assert error.square().mean() == pytest.approx(1, abs=4 * (2 / 500) ** 0.5)  # a chi-squared variable over 500


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    """Of (.5, .3, .15, .05) the nucleus of .6 is {0, 1}: .5 < .6 <= .8; renormalised (.625, .375)."""
    shares = shares_of([0.5, 0.3, 0.15, 0.05], top_p=0.6)
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=4 * 0.0024)
    assert shares[2] == shares[3] == 0


@pytest.mark.parametrize("top_p", [0.1, 1e-300])
def test_the_smallest_nucleus_is_the_most_likely_id(top_p):
    assert shares_of([0.15, 0.5, 0.3, 0.05], top_p=top_p).tolist() == [0, 1, 0, 0]


def test_the_least_likely_id_first_changes_nothing():
    shares = shares_of([0.05, 0.15, 0.3, 0.5], top_p=0.6)
    np.testing.assert_allclose(shares, [0, 0, 0.375, 0.625], atol=4 * 0.0024)


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("vocab_size", [2, 3, 10, 49_152])
def test_an_id_without_mass_is_never_drawn(uniform, vocab_size):
    """At both ends of the interval, with all the mass on two ids and one of them padded by zeros on either side."""
    logp = torch.full((1, vocab_size), -torch.inf)
    alive = [vocab_size // 2, vocab_size - 1 if vocab_size < 4 else vocab_size - 2]
    logp[0, alive] = torch.tensor(0.5).log()
    [drawn] = draw(logp, SamplingParams(max_new_tokens=1), torch.full((1, DRAWS_PER_TOKEN), float(uniform)).double())
    assert int(drawn) in alive


def test_rounding_of_the_logits_rarely_moves_a_draw():
    """49,152 ids, a quarter of the mass on ids below 1e-5 each, logits moved by float32's rounding (1e-6)."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 49_152, generator=generator)
    logits = logits.expand(500, -1)
    moved = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    uniform = streams([1], 1, 500)[0]
    first, second = (draw(z.log_softmax(-1), SamplingParams(max_new_tokens=1), uniform) for z in (logits, moved))
    assert (first != second).sum() <= 1


def test_a_row_of_numbers_is_its_seeds_own():
    table = streams([3, 4], 2, 6)
    assert table.shape == (4, 6, DRAWS_PER_TOKEN)
    assert torch.equal(streams([4], 2, 6), table[2:])
    assert torch.equal(streams([3, 4], 1, 4), table[::2, :4])
    assert len(table.unique()) == table.numel()


def test_temperature_0_takes_the_most_likely():
    logp = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]).log()
    assert draw(logp, SamplingParams(max_new_tokens=1, temperature=0.0), torch.zeros(2, 2)).tolist() == [1, 0]
