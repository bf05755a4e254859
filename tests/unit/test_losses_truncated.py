"""Every truncated loss against its closed form, in float64 unless the precision is the point.

The symbols are those of tests/truncated_losses.py.
"""

import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import (
    Support,
    forward_kl,
    gather,
    intersection_support,
    log_probs,
    log_tail,
    reverse_kl,
    stop_gradient_reverse_kl,
    student_support,
    tail_reverse_kl,
    teacher_support,
    union_support,
)
from tests.truncated_losses import FUNCTIONS, LOSSES, VOCAB, closed_form, logits_pair, members, tensor

OWNERS = ["student", "teacher", "intersection", "union"]

DIVERGENCES = ["renormalised_reverse", "renormalised_forward", "tail_reverse", "tail_forward"]
"""Those that are one: not negative, and 0 where p = q on the support."""


def supported(owner: str, logp: Tensor, logq: Tensor, k: int) -> Support:
    student_ids, teacher_ids = logp.topk(k).indices, logq.topk(k).indices
    match owner:
        case "student":
            return student_support(student_ids)
        case "teacher":
            return teacher_support(teacher_ids)
        case "union":
            return union_support(student_ids, teacher_ids)
        case _:
            return intersection_support(student_ids, teacher_ids)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("k", [1, 4, VOCAB])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_closed_form(name: str, temperature: float, k: int, owner: str) -> None:
    for seed in range(3):
        z, teacher = logits_pair(seed)
        logp, logq = log_probs(z, temperature), log_probs(teacher, temperature)
        support = supported(owner, logp, logq, k)
        loss = LOSSES[name](logp, logq, support)
        m = members(support, logp)
        value, gradient = closed_form(name, logp.exp(), logq.exp(), m)
        has_support = support.mask_BTS.any(-1)
        # The teacher's 1 - Q is off by up to 8 eps: its logarithm by that over 1 - Q.
        tail_q = ((1 - m) * logq.exp()).sum(-1)
        is_tail = "tail" in name and k < VOCAB
        atol = 1e-13 + (8 * 2**-52 / tail_q.min().item() if is_tail else 0.0)
        assert (loss[~has_support] == 0).all()
        torch.testing.assert_close(loss[has_support], value[has_support], rtol=0, atol=atol)
        (autograd,) = torch.autograd.grad(loss.sum(), z)
        # d(z / T) / dz = 1 / T
        torch.testing.assert_close(autograd[has_support], gradient[has_support] / temperature, rtol=0, atol=atol)
        assert (autograd[~has_support] == 0).all()
        if k == VOCAB:
            assert has_support.all()
        if (k, owner) == (1, "intersection"):
            assert not has_support.all(), "the top ids of all 6 positions agree: no position tests the empty support"


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "stop_gradient"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    z, teacher = logits_pair(0)
    logq = log_probs(teacher, 1.0)
    support = union_support(z.detach().topk(3).indices, logq.topk(3).indices)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](log_probs(z, 1.3), logq, support), (z,))


@pytest.mark.parametrize("name", LOSSES)
def test_over_the_whole_vocabulary_it_is_the_divergence(name: str) -> None:
    z, teacher = logits_pair(0)
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    full = forward_kl(logp, logq) if "forward" in name else reverse_kl(logp, logq)
    truncated = LOSSES[name](logp, logq, student_support(logp.topk(VOCAB).indices))
    torch.testing.assert_close(truncated, full, rtol=0, atol=1e-14)
    (truncated_gradient,) = torch.autograd.grad(truncated.sum(), z, retain_graph=True)
    (full_gradient,) = torch.autograd.grad(full.sum(), z)
    torch.testing.assert_close(truncated_gradient, full_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["renormalised_reverse", "renormalised_forward"])
def test_renormalised_over_one_id_there_is_nothing_to_learn(name: str) -> None:
    z, teacher = logits_pair(0)
    loss = LOSSES[name](log_probs(z, 1.0), log_probs(teacher, 1.0), student_support(z.topk(1).indices))
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), z)[0] == 0).all()


def test_value_by_hand_can_be_negative() -> None:
    # Support {0} of p = [1/4, 3/4], q = [1/2, 1/2]: L = 1/4 ln(1/2), so dL/dz = p_j (m_j r_j - L)
    # = [1/4 (-ln 2 + 1/4 ln 2), 3/4 (1/4 ln 2)] = [-3/16 ln 2, 3/16 ln 2]: the token the teacher prefers is pulled up.
    z = tensor([0.0, math.log(3)]).requires_grad_()
    logp = log_probs(z, 1.0)
    loss = stop_gradient_reverse_kl(logp[..., :1], tensor([0.5]).log(), torch.tensor([[[True]]]))
    assert loss.item() == pytest.approx(-math.log(2) / 4, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.flatten().tolist() == pytest.approx([-3 / 16 * math.log(2), 3 / 16 * math.log(2)], abs=1e-15)


def test_the_bias_of_the_unnormalised_loss_is_the_gradient_of_the_mass_and_its_threshold_is_not_1() -> None:
    z, teacher = logits_pair(0)
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    support = student_support(logp.topk(4).indices)
    biased = LOSSES["biased"](logp, logq, support)
    mass = gather(logp, support).exp().sum(-1)
    gradients = [
        torch.autograd.grad(value.sum(), z, retain_graph=True)[0]
        for value in (biased, LOSSES["stop_gradient"](logp, logq, support), mass)
    ]
    torch.testing.assert_close(gradients[0] - gradients[1], gradients[2], rtol=0, atol=1e-14)
    # Descent pulls an id of the support up where its gradient is negative: where q / p > exp(1 - P - L).
    threshold = (1 - mass - biased).exp()[..., None]
    on_support = members(support, logp).bool()
    assert torch.equal((gradients[0] < 0)[on_support], ((logq - logp).exp() > threshold)[on_support])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 20, 500])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "biased"])
def test_a_teacher_equal_to_the_student_gives_zero_gradient_to_the_bit(name: str, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # From nearly uniform to a mass of 1 - 1e-6 on one id: the tails span what float32 can and cannot tell from 0.
    scale = torch.tensor([1.0, 4.0, 16.0])[:, None]
    z = (scale * torch.randn(8, 3, 500, generator=generator)).to(dtype).requires_grad_()
    logp = log_probs(z, 0.7)
    loss = LOSSES[name](logp, logp.detach(), student_support(logp.topk(k).indices))
    assert loss.abs().max() <= 16 * torch.finfo(logp.dtype).eps
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.dtype == dtype
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["tail_reverse", "tail_forward"])
def test_a_small_tail_keeps_its_gradient_in_float32(name: str) -> None:
    # p has 1 - 1e-5 on the support and q 0.9: 1 - P, computed from P in float32, would be 1 % off, and the two terms
    # of the forward gradient that are (1 - Q) / (1 - P) = 1e4 times p would cancel to 3 digits.
    logp = tensor([1 - 1e-5, 6e-6, 4e-6]).log()
    logq = tensor([0.9, 0.06, 0.04]).log()
    support = student_support(torch.tensor([[[0]]]))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        z = logp.to(dtype).requires_grad_()
        loss = LOSSES[name](log_probs(z, 1.0), logq.to(dtype), support)
        gradients.append(torch.autograd.grad(loss.sum(), z)[0].double())
    # The teacher's tail of 0.1 is known to 1e-6, and float32 rounds the terms, of order 0.1, to 6e-9.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-5, atol=1e-8)
    _, expected = closed_form(name, logp.exp(), logq.exp(), members(support, logp))
    torch.testing.assert_close(gradients[1], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["tail_reverse", "tail_forward"])
@pytest.mark.parametrize("excess", [0.0, 3e-4])
def test_a_teacher_whose_list_sums_to_1_or_just_above_has_a_finite_loss(name: str, excess: float) -> None:
    # The student has 0.2 off the list. As float32 knows it the teacher's tail is at most 8 eps = 9.5e-7:
    # L = .8 ln .8 + .2 ln(.2 / 9.5e-7), or 0 + 9.5e-7 ln(9.5e-7 / .2) - ln .8.
    logp, logq = tensor([0.8, 0.2]).float().log(), torch.tensor([[[math.log1p(excess), -torch.inf]]])
    loss = LOSSES[name](logp, logq, student_support(torch.tensor([[[0]]])))
    tail = 8 * 2**-23
    value = {
        "tail_reverse": 0.8 * math.log(0.8) + 0.2 * math.log(0.2 / tail),
        "tail_forward": tail * math.log(tail / 0.2) - math.log(0.8),
    }[name]
    assert loss.item() == pytest.approx(value, abs=2 * excess + 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_give_the_float32_gradient_of_the_same_logits(name: str) -> None:
    z, teacher = (x.detach().bfloat16() for x in logits_pair(0))
    logq = log_probs(teacher, 1.0)
    support = union_support(z.topk(3).indices, teacher.topk(3).indices)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = z.to(dtype).requires_grad_()
        loss = LOSSES[name](log_probs(leaf, 1.0), logq, support)
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 0.0])
def test_masked_entries_count_for_nothing_whatever_they_hold(name: str, junk: float) -> None:
    z, teacher = logits_pair(0)
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    support = student_support(torch.tensor([3, 5, -1, 5]).expand(2, 3, 4))
    assert support.mask_BTS[0, 0].tolist() == [True, True, False, False]
    only = student_support(torch.tensor([3, 5]).expand(2, 3, 2))
    with_junk = (
        torch.where(support.mask_BTS, gather(logp, support), junk),
        torch.where(support.mask_BTS, gather(logq, support), junk),
    )
    tail = (log_tail(logp, support),) if "tail" in name else ()
    loss = FUNCTIONS[name](with_junk[0], *tail, with_junk[1], support.mask_BTS)
    expected = LOSSES[name](logp, logq, only)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_a_position_without_support_has_no_loss_and_no_gradient(name: str) -> None:
    z = torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
    support = student_support(torch.full((1, 1, 4), -1))
    loss = LOSSES[name](log_probs(z, 1.0), torch.full((1, 1, VOCAB), math.nan), support)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_id_of_the_support_that_is_impossible_for_both_counts_for_nothing(name: str) -> None:
    # Ids 0 and 1 as in p = [1/2, 1/4, 1/4], q = [1/4, 1/2, 1/4]; id 3 is impossible for both.
    z = tensor([math.log(2), 0.0, 0.0, -math.inf]).requires_grad_()
    logq = tensor([0.25, 0.5, 0.25, 0.0]).log()
    logp = log_probs(z, 1.0)
    loss = LOSSES[name](logp, logq, student_support(torch.tensor([[[0, 1, 3]]])))
    value, gradient = closed_form(
        name, logp[..., :3].exp(), logq[..., :3].exp(), torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    )
    torch.testing.assert_close(loss, value, rtol=0, atol=1e-15)
    (autograd,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(autograd[..., :3], gradient, rtol=0, atol=1e-15)
    assert autograd[0, 0, 3].item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_an_id_of_the_support_that_one_of_them_thinks_impossible(name: str) -> None:
    # KL(a || b) with a > 0 = b is inf, and with a = 0 < b the term is 0. The student's p = [1/2, 1/4, 1/4, 0].
    z = tensor([math.log(2), 0.0, 0.0, -math.inf]).requires_grad_()
    logp = log_probs(z, 1.0)
    student_lacks = LOSSES[name](
        logp, tensor([0.25, 0.25, 0.25, 0.25]).log(), student_support(torch.tensor([[[0, 3]]]))
    )
    teacher_lacks = LOSSES[name](logp, tensor([0.5, 0.0, 0.25, 0.25]).log(), student_support(torch.tensor([[[0, 1]]])))
    infinite, finite = (student_lacks, teacher_lacks) if "forward" in name else (teacher_lacks, student_lacks)
    assert infinite.item() == math.inf
    # On {0, 3}, reverse: 1/2 ln 2 + tail 1/2 ln(1/2 / 1/2); renormalised p = [1, 0], q = [1/2, 1/2]: ln 2.
    # On {0, 1}, forward: 1/2 ln 1 + tail 1/2 ln(1/2 / 1/4); renormalised q = [1, 0], p = [2/3, 1/3]: ln(3/2).
    value = {
        "stop_gradient": math.log(2) / 2,
        "biased": math.log(2) / 2,
        "tail_reverse": math.log(2) / 2,
        "renormalised_reverse": math.log(2),
        "tail_forward": math.log(2) / 2,
        "renormalised_forward": math.log(3 / 2),
    }[name]
    assert finite.item() == pytest.approx(value, abs=4e-15)
    assert torch.autograd.grad(finite.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_not_negative_in_float32_beyond_rounding(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = 4 * torch.randn(4, 8, 500, generator=generator)
    teacher = student + 1e-3 * torch.randn(4, 8, 500, generator=generator)
    logp, logq = log_probs(student, 1.0), log_probs(teacher, 1.0)
    loss = LOSSES[name](logp, logq, student_support(logp.topk(20).indices))
    # Terms that are not negative, each rounded by eps of its own mass; a tail of 1 - Q is known to 8 eps.
    assert loss.min() >= -8 * 2**-23


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_is_a_constant(name: str) -> None:
    z, teacher = logits_pair(0)
    teacher.requires_grad_()
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    LOSSES[name](logp, logq, student_support(z.topk(4).indices)).sum().backward()
    assert teacher.grad is None
    assert z.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_teacher_log_prob_is_an_error_that_says_how_many_and_where(name: str) -> None:
    logq = torch.zeros(2, 2, 3)
    logq[0, 0, 0] = logq[1, 0, 2] = logq[1, 1, 0] = torch.nan
    ids = torch.arange(3).repeat(2, 2, 1)
    ids[0, 0, 0] = -1
    with pytest.raises(ValueError, match=r"2 of 11 teacher log-probs are missing \(NaN\), the first at \(1, 0, 2\)"):
        LOSSES[name](torch.zeros(2, 2, 3), logq, student_support(ids))


def test_shapes_are_never_broadcast() -> None:
    zeros, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"support_BTS has shape \(1, 2, 1\), student_logp_BTS has \(1, 2, 3\)"):
        stop_gradient_reverse_kl(zeros, zeros, mask[..., :1])
    with pytest.raises(ValueError, match=r"student_log_tail_BT has shape \(1, 1\)"):
        tail_reverse_kl(zeros, zeros[:, :1, 0], zeros, mask)
