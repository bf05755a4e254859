import math

import pytest
import torch

from student_trainer.losses import Support
from student_trainer.monitor import (
    Counts,
    bias,
    bias_ratio,
    count,
    deciles,
    entropy,
    hedge_frequency,
    lengths,
    mass_of,
    outside_square_mass,
    overlap,
    repeat_ratio,
    sampled_reverse_kl,
    support_mass,
    token_means,
    unnormalised_loss,
    zlib_ratio,
)

NAN = math.nan
HEDGES = ("wait", "but", "maybe")
# One response of two tokens and a padding token that holds NaN.
MASK = torch.tensor([[True, True, False]])


def mean(value_BT: torch.Tensor, mask_BT: torch.Tensor = MASK) -> float:
    return token_means({"value": value_BT}, mask_BT)["value"]


def test_overlap_counts_shared_ids_and_their_mass() -> None:
    # Token 0 shares {1}: 1/2. Token 1 shares both, in another order: 2/2. Ratio 3/4.
    # p mass .6 and .9, mean .75; q mass .3 and .8, mean .55. Padding ids equal each other and do not count.
    student_ids = torch.tensor([[[1, 2], [3, 4], [-1, -1]]])
    teacher_ids = torch.tensor([[[5, 1], [4, 3], [-1, -1]]])
    p = torch.tensor([[[0.6, 0.2], [0.5, 0.4], [NAN, NAN]]])
    q = torch.tensor([[[0.5, 0.3], [0.7, 0.1], [NAN, NAN]]])
    result = overlap(student_ids, p.log(), teacher_ids, q.log())
    assert mean(result.ratio_BT) == 0.75
    assert mean(result.student_mass_BT) == pytest.approx(0.75)
    assert mean(result.teacher_mass_BT) == pytest.approx(0.55)


def test_padding_ids_are_no_overlap() -> None:
    ids = torch.tensor([[[1, -1]]])
    logp = torch.tensor([[[0.6, NAN]]]).log()
    result = overlap(ids, logp, ids, logp)
    assert (float(result.ratio_BT), float(result.student_mass_BT)) == (0.5, pytest.approx(0.6))


def test_overlap_needs_one_k() -> None:
    ids, logp = torch.zeros(1, 3, 2, dtype=torch.int64), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r"teacher_top_ids_BTK has shape \(1, 3, 1\)"):
        overlap(ids, logp, ids[..., :1], logp[..., :1])


def test_support_mass_leaves_masked_entries_and_padding_out() -> None:
    # P: (.6 + .3) / 2 = .45; Q: (.8 + .5) / 2 = .65; gap -.2
    p = torch.tensor([[[0.4, 0.2, NAN], [0.3, NAN, NAN], [NAN, NAN, NAN]]])
    q = torch.tensor([[[0.5, 0.3, NAN], [0.5, NAN, NAN], [NAN, NAN, NAN]]])
    support = ~p.isnan()
    support[0, 2] = True
    mass = support_mass(p.log(), q.log(), support)
    assert (mean(mass.student_BT), mean(mass.teacher_BT), mean(mass.gap_BT)) == pytest.approx((0.45, 0.65, -0.2))


def test_a_missing_log_prob_on_a_response_token_makes_the_metric_nan() -> None:
    support, mask = torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([[True]])
    mass = support_mass(torch.zeros(1, 1, 1), torch.full((1, 1, 1), NAN), support)
    assert mean(mass.student_BT, mask) == 1.0
    assert math.isnan(mean(mass.teacher_BT, mask))
    assert math.isnan(mean(mass.gap_BT, mask))


def test_the_unnormalised_loss_is_minus_q_over_e_where_it_stops() -> None:
    # At p = q / e on S: sum p log(p / q) = -sum p = -Q / e. With Q = .8: -.8 / e. A masked entry counts for nothing.
    q = torch.tensor([[[0.5, 0.3, NAN]]], dtype=torch.float64)
    support = torch.tensor([[[True, True, False]]])
    loss = unnormalised_loss((q / math.e).log(), q.log(), support)
    assert float(loss) == pytest.approx(-0.8 / math.e, abs=1e-15)
    # p = 0 adds 0, even where q = 0 too; p = q gives 0.
    zero = torch.tensor([[[0.5, 0.0, 0.0]]]).log()
    assert float(unnormalised_loss(zero, zero, torch.ones(1, 1, 3, dtype=torch.bool))) == 0.0


def test_bias_is_the_norm_of_the_gradients_that_autograd_gives() -> None:
    """V = 5, S = {3, 1} and a masked entry: grad of P, and grad of sum_S p sg(log p - log q), both by autograd."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher_logp = torch.randn(1, 3, 5, dtype=torch.float64, generator=generator).log_softmax(-1)
    support = Support(torch.tensor([3, 1, -1]).expand(1, 3, 3), torch.tensor([True, True, False]).expand(1, 3, 3))
    ids = torch.tensor([3, 1, 0]).expand(1, 3, 3)
    logp = logits.log_softmax(-1)
    p_BTS, log_ratio_BTS = logp.exp()[..., [3, 1]], (logp - teacher_logp)[..., [3, 1]].detach()
    (grad_mass,) = torch.autograd.grad(p_BTS.sum(), logits, retain_graph=True)
    (pull,) = torch.autograd.grad((p_BTS * log_ratio_BTS).sum(), logits)
    with torch.no_grad():
        outside = outside_square_mass(logp.exp(), support)
        result = bias(logp.gather(-1, ids), teacher_logp.gather(-1, ids), support.mask_BTS, outside)
    torch.testing.assert_close(outside, logp.exp().detach()[..., [0, 2, 4]].square().sum(-1))
    torch.testing.assert_close(result.norm_BT, grad_mass.norm(dim=-1))
    torch.testing.assert_close(result.pull_norm_BT, pull.norm(dim=-1))


def test_the_flipped_share_is_what_the_teacher_prefers_and_the_unnormalised_loss_pushes_down() -> None:
    # p = (.4, .3, .2), q = (.3, .4, .25): P = .9, L = .4 ln(4/3) + .3 ln(3/4) + .2 ln(4/5) = -.0158593.
    # exp(1 - P - L) = exp(.1158593) = 1.1228. q/p = .75, 1.333, 1.25: none lies in (1, 1.1228); two lie in (1, e).
    p, q = torch.tensor([[[0.4, 0.3, 0.2]]]), torch.tensor([[[0.3, 0.4, 0.25]]])
    support = torch.ones(1, 1, 3, dtype=torch.bool)
    result = bias(p.log(), q.log(), support, torch.tensor([[0.01]]))
    assert (float(result.flipped_share_BT), float(result.flipped_score_share_BT)) == pytest.approx((0.0, 2 / 3))
    # The third entry masked and q = (.3, .38): P = .7, L = .1150728 - .0709167 = .0441561, exp(.2558439) = 1.2915.
    # q/p = 1.2667 of the second lies below: 1 of 2.
    support[..., 2] = False
    q[0, 0, 1] = 0.38
    assert float(bias(p.log(), q.log(), support, torch.tensor([[0.1]])).flipped_share_BT) == 0.5


def test_the_unnormalised_gradient_of_a_flipped_entry_pushes_it_down() -> None:
    """The entry of the last test that counts as flipped: descent on sum_S p (log p - log q) lowers its logit."""
    p, q = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64), torch.tensor([0.3, 0.38, 0.32], dtype=torch.float64)
    logits = p.log().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.exp() * (logp - q.log()))[:2].sum().backward()
    assert logits.grad is not None
    assert logits.grad[1] > 0
    assert q[1] > p[1]


def test_a_ratio_without_a_pull_is_not_a_number() -> None:
    assert bias_ratio(1.0, 2.0) == 0.5
    assert bias_ratio(1.0, 0.0) == math.inf
    assert math.isnan(bias_ratio(0.0, 0.0))


def test_entropy_is_the_mean_over_response_tokens() -> None:
    # Uniform over 4: ln 4. Certain, with p = 0 elsewhere: 0. Mean ln 2.
    p = torch.tensor([[[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [NAN] * 4]], dtype=torch.float64)
    assert mean(entropy(p, p.log())) == pytest.approx(math.log(2), abs=1e-7)


def test_the_mass_of_several_ids_is_their_sum() -> None:
    assert mass_of([0, 2], torch.tensor([[[0.5, 0.2, 0.3]]])).tolist() == [[pytest.approx(0.8)]]


def test_sampled_reverse_kl_is_unbiased() -> None:
    # p = [1/2, 1/2], q = [1/4, 3/4]: one sample of each id is the expectation, 1/2 ln 2 + 1/2 ln(2/3) = KL(p || q).
    student = torch.tensor([[0.5, 0.5, NAN]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75, NAN]], dtype=torch.float64).log()
    assert mean(sampled_reverse_kl(student, teacher)) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)


def test_deciles_are_tenths_of_a_response() -> None:
    assert deciles(20).tolist() == [d for d in range(10) for _ in range(2)]
    # Token t of 3 in decile floor(10 t / 3): 0, 3.33 and 6.67; of a response shorter than ten, most have no token.
    assert deciles(3).tolist() == [0, 3, 6]


def test_metrics_need_a_response_token() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        token_means({"x": torch.zeros(1, 1)}, torch.tensor([[False]]))
    with pytest.raises(ValueError, match="0 tokens"):
        hedge_frequency([of_text("")])
    with pytest.raises(ValueError, match="0 tokens"):
        repeat_ratio([of_ids([]), of_ids([])])


def of_text(text: str, num_tokens: int = 0) -> Counts:
    return count(text, range(num_tokens), HEDGES, is_finished=True)


def of_ids(ids: list[int], *, is_finished: bool = True) -> Counts:
    return count("", ids, HEDGES, is_finished=is_finished)


def test_lengths() -> None:
    # 1, 2, 3 and 4 tokens: mean 2.5; the 95th percentile lies .95 * 3 = 2.85 steps up the sorted list: 3.85.
    result = lengths([of_ids([0] * 4, is_finished=False), of_ids([0]), of_ids([0] * 3), of_ids([0] * 2)])
    assert (result.mean, result.p95, result.truncation_rate) == pytest.approx((2.5, 3.85, 0.25))


def test_hedge_frequency_counts_whole_words_per_token() -> None:
    # "Wait", "but" and "maybe" hedge, "waiter" and "butter" do not: 3 of 4 + 6 tokens.
    assert hedge_frequency([of_text("Wait, but the waiter", 4), of_text("ate butter, maybe.", 6)]) == 0.3
    assert hedge_frequency([of_text("but be it, but", 4)]) == 0.5


def test_repeat_ratio_is_over_tokens_and_never_across_responses() -> None:
    # 1 2 3 1 2 3: trailing 3-grams 123 231 312 123, the last one seen before: 1 of 6.
    assert repeat_ratio([of_ids([1, 2, 3, 1, 2, 3])]) == pytest.approx(1 / 6)
    # 7 7 7 7 7: 777 three times, two of them repeats: 2 of 5.
    assert repeat_ratio([of_ids([7] * 5)]) == pytest.approx(2 / 5)
    assert repeat_ratio([of_ids([1, 2, 3]), of_ids([1, 2, 3]), of_ids([4])]) == 0.0


def test_zlib_ratio_weighs_texts_by_their_bytes() -> None:
    # An empty text has no bytes. A repeated letter deflates to almost nothing, "a" to 3 bytes: 3 / 1.
    assert zlib_ratio([of_text("a"), of_text("")]) == 3.0
    assert zlib_ratio([of_text("ab" * 5000)]) < 0.01
    # Each alone: a text's twin does not make it shorter.
    text = of_text("the quick brown fox jumps over the lazy dog")
    assert zlib_ratio([text, text]) == zlib_ratio([text])
    assert math.isnan(zlib_ratio([of_text("")]))
