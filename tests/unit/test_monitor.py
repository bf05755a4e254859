import math

import pytest
import torch

from student_trainer.monitor import (
    entropy,
    hedge_frequency,
    lengths,
    overlap,
    repeat_ratio,
    sampled_reverse_kl,
    support_mass,
)

NAN = math.nan
# One response of two tokens and a padding token that holds NaN.
MASK = torch.tensor([[True, True, False]])


def test_overlap_counts_shared_ids_and_their_mass() -> None:
    # Token 0 shares {1}: 1/2. Token 1 shares both, in another order: 2/2. Ratio 3/4.
    # p mass .6 and .9, mean .75; q mass .3 and .8, mean .55. Padding ids equal each other and do not count.
    student_ids = torch.tensor([[[1, 2], [3, 4], [-1, -1]]])
    teacher_ids = torch.tensor([[[5, 1], [4, 3], [-1, -1]]])
    p = torch.tensor([[[0.6, 0.2], [0.5, 0.4], [NAN, NAN]]])
    q = torch.tensor([[[0.5, 0.3], [0.7, 0.1], [NAN, NAN]]])
    result = overlap(student_ids, p.log(), teacher_ids, q.log(), MASK)
    assert result.ratio == 0.75
    assert result.student_mass == pytest.approx(0.75)
    assert result.teacher_mass == pytest.approx(0.55)


def test_padding_ids_are_no_overlap() -> None:
    ids = torch.tensor([[[1, -1]]])
    logp = torch.tensor([[[0.6, NAN]]]).log()
    result = overlap(ids, logp, ids, logp, torch.tensor([[True]]))
    assert (result.ratio, result.student_mass) == (0.5, pytest.approx(0.6))


def test_overlap_needs_one_k() -> None:
    with pytest.raises(ValueError, match=r"teacher_top_ids_BTK has shape \(1, 3, 1\)"):
        overlap(
            torch.zeros(1, 3, 2, dtype=torch.int64),
            torch.zeros(1, 3, 2),
            torch.zeros(1, 3, 1, dtype=torch.int64),
            torch.zeros(1, 3, 1),
            MASK,
        )


def test_support_mass_leaves_masked_entries_and_padding_out() -> None:
    # P: (.6 + .3) / 2 = .45; Q: (.8 + .5) / 2 = .65; gap -.2
    p = torch.tensor([[[0.4, 0.2, NAN], [0.3, NAN, NAN], [NAN, NAN, NAN]]])
    q = torch.tensor([[[0.5, 0.3, NAN], [0.5, NAN, NAN], [NAN, NAN, NAN]]])
    support = ~p.isnan()
    support[0, 2] = True
    mass = support_mass(p.log(), q.log(), support, MASK)
    assert (mass.student, mass.teacher, mass.gap) == pytest.approx((0.45, 0.65, -0.2))


def test_a_missing_log_prob_on_a_response_token_makes_the_metric_nan() -> None:
    support = torch.ones(1, 1, 1, dtype=torch.bool)
    mass = support_mass(torch.zeros(1, 1, 1), torch.full((1, 1, 1), NAN), support, torch.tensor([[True]]))
    assert mass.student == 1.0
    assert math.isnan(mass.teacher)
    assert math.isnan(mass.gap)


def test_entropy_is_the_mean_over_response_tokens() -> None:
    # Uniform over 4: ln 4. Certain, with p = 0 elsewhere: 0. Mean ln 2.
    p = torch.tensor([[[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [NAN] * 4]], dtype=torch.float64)
    assert entropy(p.log(), MASK) == pytest.approx(math.log(2), abs=1e-15)


def test_sampled_reverse_kl_is_unbiased() -> None:
    # p = [1/2, 1/2], q = [1/4, 3/4]: one sample of each id is the expectation, 1/2 ln 2 + 1/2 ln(2/3) = KL(p || q).
    student = torch.tensor([[0.5, 0.5, NAN]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.75, NAN]], dtype=torch.float64).log()
    assert sampled_reverse_kl(student, teacher, MASK) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)


def test_metrics_need_a_response_token() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        entropy(torch.zeros(1, 1, 2), torch.tensor([[False]]))
    with pytest.raises(ValueError, match="0 tokens"):
        hedge_frequency([""], 0)
    with pytest.raises(ValueError, match="0 tokens"):
        repeat_ratio([[], []])


def test_lengths() -> None:
    # 1, 2, 3 and 4 tokens: mean 2.5; the 95th percentile lies .95 * 3 = 2.85 steps up the sorted list: 3.85.
    mask = torch.arange(4) < torch.tensor([[4], [1], [3], [2]])
    result = lengths(mask, torch.tensor([False, True, True, True]))
    assert (result.mean, result.p95, result.truncation_rate) == pytest.approx((2.5, 3.85, 0.25))


def test_hedge_frequency_counts_whole_words_per_token() -> None:
    # "Wait", "but" and "maybe" hedge, "waiter" and "butter" do not: 3 of 10 tokens.
    assert hedge_frequency(["Wait, but the waiter", "ate butter, maybe."], 10) == 0.3
    assert hedge_frequency(["so be it, so"], 4, frozenset({"so"})) == 0.5


def test_repeat_ratio_is_over_tokens_and_never_across_responses() -> None:
    # 1 2 3 1 2 3: trailing 3-grams 123 231 312 123, the last one seen before: 1 of 6.
    assert repeat_ratio([[1, 2, 3, 1, 2, 3]]) == pytest.approx(1 / 6)
    # 7 7 7 7 7: 777 three times, two of them repeats: 2 of 5.
    assert repeat_ratio([[7] * 5]) == pytest.approx(2 / 5)
    assert repeat_ratio([[1, 2, 3], [1, 2, 3], [4]]) == 0.0
