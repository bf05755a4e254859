import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import forward_kl, jsd, log_probs, reverse_kl

SEEDS = [0, 1, 2, 3]
SHAPE = (2, 3, 7)  # B, T, V


def logits_pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_log_probs_divides_the_logits_by_the_temperature() -> None:
    # softmax([0, ln 3]) = [1, 3] / 4; at T = 1/2 the odds are squared: [1, 9] / 10.
    logits = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64)
    torch.testing.assert_close(log_probs(logits, 1.0).exp(), torch.tensor([[[0.25, 0.75]]], dtype=torch.float64))
    torch.testing.assert_close(log_probs(logits, 0.5).exp(), torch.tensor([[[0.1, 0.9]]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_widens_half_precision_before_it_divides(dtype: torch.dtype) -> None:
    # 1, 2 and 3 are exact in both types; 1/0.7, 2/0.7, 3/0.7 are not, so dividing first would differ in the 3rd digit.
    logits = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=dtype)
    logp = log_probs(logits, 0.7)
    assert logp.dtype == torch.float32
    scale = math.log(sum(math.exp(z / 0.7) for z in (1, 2, 3)))
    torch.testing.assert_close(logp, torch.tensor([[[z / 0.7 - scale for z in (1, 2, 3)]]]), rtol=0, atol=1e-6)


def test_log_probs_keeps_float64() -> None:
    assert log_probs(torch.zeros(1, 1, 2, dtype=torch.float64), 1.0).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_log_probs_refuses_a_temperature_that_is_not_above_0_and_finite(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        log_probs(torch.zeros(1, 1, 2), temperature)


def test_values_by_hand() -> None:
    # p = [1/2, 1/2], q = [1/4, 3/4].
    # KL(p||q) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3);  KL(q||p) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2.
    logp = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    logq = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log()
    assert reverse_kl(logp, logq).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    assert forward_kl(logp, logq).item() == pytest.approx(0.75 * math.log(3) - math.log(2), abs=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_kl_gradient_is_p_times_r_minus_kl(seed: int, temperature: float) -> None:
    z, teacher = logits_pair(seed)
    logp, logq = log_probs(z, temperature), log_probs(teacher, temperature)
    kl = reverse_kl(logp, logq)
    r = logp - logq
    torch.testing.assert_close(kl, (logp.exp() * r).sum(-1), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(kl.sum(), z)
    # d(z / T) / dz = 1 / T
    torch.testing.assert_close(gradient, logp.exp() * (r - kl[..., None]) / temperature, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_forward_kl_gradient_is_p_minus_q(seed: int, temperature: float) -> None:
    z, teacher = logits_pair(seed)
    logp, logq = log_probs(z, temperature), log_probs(teacher, temperature)
    kl = forward_kl(logp, logq)
    torch.testing.assert_close(kl, (logq.exp() * (logq - logp)).sum(-1), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(gradient, (logp.exp() - logq.exp()) / temperature, rtol=0, atol=1e-14)


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_gradients_agree_with_finite_differences(divergence) -> None:
    z, teacher = logits_pair(0)
    logq = log_probs(teacher, 1.0)
    assert torch.autograd.gradcheck(lambda z: divergence(log_probs(z, 1.3), logq), (z,))
    assert torch.autograd.gradgradcheck(lambda z: divergence(log_probs(z, 1.3), logq), (z,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_a_teacher_equal_to_the_student_gives_zero_loss_and_zero_gradient_to_the_bit(divergence, dtype) -> None:
    z = (4 * torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    loss = divergence(log_probs(z, 0.8), log_probs(z.detach(), 0.8))
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert (gradient == 0).all()


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_float32_values_are_never_negative_and_match_float64(divergence) -> None:
    # A teacher 1e-3 away from the student: KL is about 5e-7, below the rounding error of the textbook float32 sum.
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 8, 1000, generator=generator, dtype=torch.float64)
    teacher = student + 1e-3 * torch.randn(4, 8, 1000, generator=generator, dtype=torch.float64)
    logp, logq = log_probs(student, 1.0), log_probs(teacher, 1.0)
    single = divergence(logp.float(), logq.float())
    assert (single >= 0).all()
    torch.testing.assert_close(single.double(), divergence(logp, logq), rtol=0, atol=5e-8)


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_descent_stops_at_the_teacher(divergence) -> None:
    q = torch.tensor([[[0.4, 0.3, 0.15, 0.1, 0.05]]], dtype=torch.float64)
    z = torch.tensor([[[0.0, -1.0, 1.0, 0.5, 2.0]]], dtype=torch.float64, requires_grad=True)
    for _ in range(1500):
        (gradient,) = torch.autograd.grad(divergence(log_probs(z, 1.0), q.log()).sum(), z)
        with torch.no_grad():
            z -= gradient
    torch.testing.assert_close(log_probs(z, 1.0).exp(), q, rtol=0, atol=1e-12)


def test_an_id_impossible_for_both_counts_for_nothing() -> None:
    # p = [1/2, 1/2, 0], q = [1/4, 3/4, 0]: the values and the gradients of the two-id case, and 0 at the third.
    z = torch.tensor([[[0.0, 0.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    logq = torch.tensor([[[0.25, 0.75, 0.0]]], dtype=torch.float64).log()
    reverse, forward = reverse_kl(log_probs(z, 1.0), logq), forward_kl(log_probs(z, 1.0), logq)
    assert reverse.item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    assert forward.item() == pytest.approx(0.75 * math.log(3) - math.log(2), abs=1e-15)
    # p_1 (r_1 - KL) = 1/2 (ln 2 - 1/2 ln(4/3)) = 1/4 ln 3
    (gradient,) = torch.autograd.grad(reverse.sum(), z)
    expected = torch.tensor([[[math.log(3) / 4, -math.log(3) / 4, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(forward.sum(), z)
    torch.testing.assert_close(gradient, torch.tensor([[[0.25, -0.25, 0.0]]], dtype=torch.float64), rtol=0, atol=1e-15)


def test_an_id_impossible_for_the_student_alone() -> None:
    # p = [1, 0], q = [1/2, 1/2]: KL(p||q) = ln 2 with p_j (r_j - KL) = 0; KL(q||p) = inf with p - q = [1/2, -1/2].
    z = torch.tensor([[[0.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    logq = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    reverse, forward = reverse_kl(log_probs(z, 1.0), logq), forward_kl(log_probs(z, 1.0), logq)
    assert reverse.item() == pytest.approx(math.log(2), abs=1e-15)
    assert forward.item() == math.inf
    (gradient,) = torch.autograd.grad(reverse.sum(), z)
    assert gradient.tolist() == [[[0.0, 0.0]]]
    (gradient,) = torch.autograd.grad(forward.sum(), z)
    assert gradient.tolist() == [[[0.5, -0.5]]]


def test_an_id_impossible_for_the_teacher_alone() -> None:
    # p = [1/2, 1/2], q = [1, 0]: KL(p||q) = inf; KL(q||p) = ln 2 with p - q = [-1/2, 1/2].
    z = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    logq = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]], dtype=torch.float64).log()
    reverse, forward = reverse_kl(log_probs(z, 1.0), logq), forward_kl(log_probs(z, 1.0), logq)
    assert reverse[0, 0].item() == math.inf
    assert forward[0, 0].item() == pytest.approx(math.log(2), abs=1e-15)
    (gradient,) = torch.autograd.grad(forward.sum(), z, retain_graph=True)
    assert gradient[0, 0].tolist() == [-0.5, 0.5]
    (gradient,) = torch.autograd.grad(reverse.sum(), z)
    assert not gradient[0, 0].isfinite().any()
    # The other row keeps its own: 1/2 (ln 2 - 1/2 ln(4/3)) = 1/4 ln 3.
    assert gradient[0, 1].tolist() == pytest.approx([math.log(3) / 4, -math.log(3) / 4], abs=1e-15)


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_the_teacher_is_a_constant(divergence) -> None:
    z, teacher = logits_pair(0)
    teacher.requires_grad_()
    divergence(log_probs(z, 1.0), log_probs(teacher, 1.0)).sum().backward()
    assert teacher.grad is None
    assert z.grad is not None


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_a_missing_teacher_log_prob_is_an_error(divergence) -> None:
    logq = torch.zeros(1, 2, 3)
    logq[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 6 teacher log-probs are missing \(NaN\), the first at \(0, 1, 2\)"):
        divergence(torch.zeros(1, 2, 3), logq)


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_shapes_are_never_broadcast(divergence) -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 3\).*\(1, 2, 3\)"):
        divergence(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3))


BETAS = [0.1, 0.5, 0.9]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_jsd_is_its_definition_and_its_gradient_the_closed_form(seed: int, beta: float) -> None:
    z, teacher = logits_pair(seed)
    logp, logq = log_probs(z, 0.7), log_probs(teacher, 0.7)
    p, q = logp.exp(), logq.exp()
    mixture = beta * q + (1 - beta) * p
    s = (p / mixture).log()
    divergence = jsd(logp, logq, beta)
    expected = beta * (q * (q / mixture).log()).sum(-1) + (1 - beta) * (p * s).sum(-1)
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(divergence.sum(), z)
    closed_form = (1 - beta) * p * (s - (p * s).sum(-1, keepdim=True)) / 0.7
    torch.testing.assert_close(gradient, closed_form, rtol=0, atol=1e-14)


def test_jsd_tends_to_the_forward_and_the_reverse_kl_at_its_ends() -> None:
    z, teacher = logits_pair(0)
    logp, logq = log_probs(z, 1.0), log_probs(teacher, 1.0)
    torch.testing.assert_close(jsd(logp, logq, 1e-8) / 1e-8, forward_kl(logp, logq), rtol=1e-4, atol=0)
    torch.testing.assert_close(jsd(logp, logq, 1 - 1e-8) / 1e-8, reverse_kl(logp, logq), rtol=1e-4, atol=0)


def test_jsd_gradient_agrees_with_finite_differences() -> None:
    z, teacher = logits_pair(0)
    logq = log_probs(teacher, 1.0)
    assert torch.autograd.gradcheck(lambda z: jsd(log_probs(z, 1.3), logq, 0.3), (z,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_equals_is_zero_with_zero_gradient_to_the_bit(beta: float, dtype: torch.dtype) -> None:
    z = (4 * torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    loss = jsd(log_probs(z, 0.8), log_probs(z.detach(), 0.8), beta)
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), z)[0] == 0).all()


def test_jsd_is_finite_where_either_is_impossible() -> None:
    # p = [1, 0, 0], q = [0, 1, 0]: M = [1 - beta, beta, 0], so beta ln(1/beta) + (1 - beta) ln(1/(1 - beta)); s is a
    # constant on p's one id, and the gradient is 0.
    z = torch.tensor([[[0.0, -math.inf, -math.inf]]], dtype=torch.float64, requires_grad=True)
    logq = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64).log()
    loss = jsd(log_probs(z, 1.0), logq, 0.25)
    assert loss.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), abs=1e-15)
    assert torch.autograd.grad(loss.sum(), z)[0].tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_descent_of_jsd_stops_at_the_teacher(beta: float) -> None:
    q = torch.tensor([[[0.4, 0.3, 0.15, 0.1, 0.05]]], dtype=torch.float64)
    z = torch.tensor([[[0.0, -1.0, 1.0, 0.5, 2.0]]], dtype=torch.float64, requires_grad=True)
    for _ in range(600):
        (gradient,) = torch.autograd.grad(jsd(log_probs(z, 1.0), q.log(), beta).sum(), z)
        with torch.no_grad():
            z -= 4 * gradient / (beta * (1 - beta))
    torch.testing.assert_close(log_probs(z, 1.0).exp(), q, rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_jsd_refuses_a_beta_at_which_it_is_zero_everywhere(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must lie between 0 and 1"):
        jsd(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), beta)
