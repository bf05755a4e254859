import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import (
    Support,
    gather,
    log_probs,
    reverse_kl,
    stop_gradient_reverse_kl,
    student_support,
    teacher_support,
    union_support,
)

VOCAB = 9


def logits_pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 2, 3, VOCAB, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def supports(logp: Tensor, logq: Tensor, k: int) -> dict[str, Support]:
    student_ids, teacher_ids = logp.topk(k).indices, logq.topk(k).indices
    return {
        "student": student_support(student_ids),
        "teacher": teacher_support(teacher_ids),
        "union": union_support(student_ids, teacher_ids),
    }


@pytest.mark.parametrize("owner", ["student", "teacher", "union"])
@pytest.mark.parametrize("k", [1, 4, VOCAB])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_is_p_times_masked_r_minus_l(seed: int, temperature: float, k: int, owner: str) -> None:
    z, teacher = logits_pair(seed)
    logp, logq = log_probs(z, temperature), log_probs(teacher, temperature)
    support = supports(logp, logq, k)[owner]
    loss = stop_gradient_reverse_kl(gather(logp, support), gather(logq, support), support.mask_BTS)

    m = torch.zeros_like(logp).scatter_add(-1, support.ids_BTS, support.mask_BTS.double())
    p, r = logp.exp(), logp - logq
    expected_loss = (p * m * r).sum(-1)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    expected = p * (m * r - expected_loss[..., None]) / temperature
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_over_the_whole_vocabulary_it_is_the_reverse_kl(seed: int) -> None:
    z, teacher = logits_pair(seed)
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    support = student_support(logp.topk(VOCAB).indices)
    truncated = stop_gradient_reverse_kl(gather(logp, support), gather(logq, support), support.mask_BTS)
    full = reverse_kl(logp, logq)
    torch.testing.assert_close(truncated, full, rtol=0, atol=1e-14)
    (truncated_gradient,) = torch.autograd.grad(truncated.sum(), z, retain_graph=True)
    (full_gradient,) = torch.autograd.grad(full.sum(), z)
    torch.testing.assert_close(truncated_gradient, full_gradient, rtol=0, atol=1e-14)


def test_value_by_hand_can_be_negative() -> None:
    # Support {0} of p = [1/4, 3/4], q = [1/2, 1/2]: L = 1/4 ln(1/2), so dL/dz = p_j (m_j r_j - L)
    # = [1/4 (-ln 2 + 1/4 ln 2), 3/4 (1/4 ln 2)] = [-3/16 ln 2, 3/16 ln 2]: the token the teacher prefers is pulled up.
    z = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64, requires_grad=True)
    logp = log_probs(z, 1.0)
    loss = stop_gradient_reverse_kl(
        logp[..., :1], torch.tensor([[[0.5]]], dtype=torch.float64).log(), torch.tensor([[[True]]])
    )
    assert loss.item() == pytest.approx(-math.log(2) / 4, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.flatten().tolist() == pytest.approx([-3 / 16 * math.log(2), 3 / 16 * math.log(2)], abs=1e-15)


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_a_teacher_equal_to_the_student_gives_zero_gradient_to_the_bit(k: int) -> None:
    z = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    logp = log_probs(z, 0.7)
    support = student_support(logp.topk(k).indices)
    loss = stop_gradient_reverse_kl(gather(logp, support), gather(logp.detach(), support), support.mask_BTS)
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert (gradient == 0).all()


def test_descent_stops_at_p_equal_q_on_the_support() -> None:
    q = torch.tensor([[[0.4, 0.3, 0.15, 0.1, 0.05]]], dtype=torch.float64)
    z = torch.tensor([[[0.0, -1.0, 1.0, 0.5, 2.0]]], dtype=torch.float64, requires_grad=True)
    support = teacher_support(torch.tensor([[[0, 1, 3]]]))
    for _ in range(3000):
        logp = log_probs(z, 1.0)
        loss = stop_gradient_reverse_kl(gather(logp, support), gather(q.log(), support), support.mask_BTS)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        with torch.no_grad():
            z -= gradient
    p = log_probs(z, 1.0).exp()
    assert p[0, 0, [0, 1, 3]].tolist() == pytest.approx([0.4, 0.3, 0.1], abs=1e-12)
    # P = Q = 0.8. Off the support only the total is calibrated: p = q would need 0.15 and 0.05 there.
    assert p[0, 0, [2, 4]].sum().item() == pytest.approx(0.2, abs=1e-12)
    assert abs(p[0, 0, 4].item() - 0.05) > 0.05


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 0.0])
def test_masked_entries_count_for_nothing_whatever_they_hold(junk: float) -> None:
    student = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    teacher = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64).log()
    student[0, 0, 1] = teacher[0, 0, 1] = junk
    student.requires_grad_()
    loss = stop_gradient_reverse_kl(student, teacher, torch.tensor([[[True, False, True]]]))
    # 1/2 ln 2 + 1/4 ln(1/2) = 1/4 ln 2; with respect to log p the gradient is p r = [1/2 ln 2, -, -1/4 ln 2].
    assert loss.item() == pytest.approx(math.log(2) / 4, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.flatten().tolist() == pytest.approx([math.log(2) / 2, 0.0, -math.log(2) / 4], abs=1e-15)


def test_a_position_without_support_has_no_loss_and_no_gradient() -> None:
    z = torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
    support = student_support(torch.full((1, 1, 4), -1))
    loss = stop_gradient_reverse_kl(
        gather(log_probs(z, 1.0), support), torch.full((1, 1, 4), math.nan), support.mask_BTS
    )
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert (gradient == 0).all()


def test_impossible_ids() -> None:
    # p = [0, 1/2, 1/2]: 0 ln 0 = 0 even against q = 0; 1/2 against q = 0 is inf.
    z = torch.tensor([[[-math.inf, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    logq = torch.tensor([[[0.0, 0.5, 0.0]]], dtype=torch.float64).log()
    logp = log_probs(z, 1.0)
    every = torch.ones(1, 1, 2, dtype=torch.bool)
    harmless = stop_gradient_reverse_kl(logp[..., :2], logq[..., :2], every)
    assert harmless.item() == 0  # 0 + 1/2 ln 1
    (gradient,) = torch.autograd.grad(harmless.sum(), z, retain_graph=True)
    assert gradient.tolist() == [[[0.0, 0.0, 0.0]]]
    assert stop_gradient_reverse_kl(logp[..., 1:], logq[..., 1:], every).item() == math.inf


def test_the_teacher_is_a_constant() -> None:
    z, teacher = logits_pair(0)
    teacher.requires_grad_()
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    stop_gradient_reverse_kl(logp, logq, torch.ones_like(logp, dtype=torch.bool)).sum().backward()
    assert teacher.grad is None


def test_a_missing_teacher_log_prob_is_an_error_that_says_how_many_and_where() -> None:
    teacher = torch.zeros(2, 2, 3)
    teacher[0, 0, 0] = teacher[1, 0, 2] = teacher[1, 1, 0] = torch.nan
    support = torch.ones(2, 2, 3, dtype=torch.bool)
    support[0, 0, 0] = False
    with pytest.raises(ValueError, match=r"2 of 11 teacher log-probs are missing \(NaN\), the first at \(1, 0, 2\)"):
        stop_gradient_reverse_kl(torch.zeros(2, 2, 3), teacher, support)


def test_shapes_are_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"support_BTS has shape \(1, 2, 1\), student_logp_BTS has \(1, 2, 3\)"):
        stop_gradient_reverse_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 2, 1, dtype=torch.bool))
