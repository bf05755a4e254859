"""Every kind of loss from its config: what it asks of the teacher, and its value from the teacher's answer."""

import warnings
from dataclasses import replace
from typing import get_args

import pytest
import torch

from student_trainer import losses, monitor
from student_trainer.collate import Batch
from student_trainer.config import LossConfig
from student_trainer.config.loss import FULL_VOCABULARY, SAMPLED, LossKind
from student_trainer.scoring import Wanted
from student_trainer.stages.objective import Objective
from student_trainer.stages.watch import full_row

V, K, T = 11, 4, 3
TEMPERATURE = 0.7
KINDS = get_args(LossKind)


def answered(wanted: Wanted) -> tuple[torch.Tensor, Batch, torch.Tensor]:
    """Logits [1, T, V], a batch with just what `wanted` asks for and a padded last token, and the teacher's log q."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = 2 * torch.randn(2, 1, T, V, generator=generator, dtype=torch.float64)
    logp, logq = losses.log_probs(logits, TEMPERATURE), losses.log_probs(teacher, TEMPERATURE)
    mask = torch.tensor([[True, True, False]])
    ids = torch.tensor([[3, 5, 0]])
    top = logq.topk(wanted.teacher_top_k)
    student_top = logp.topk(K).indices
    candidates = logq if wanted.vocab_size else logq.gather(-1, student_top[..., : wanted.student_top_k])

    def padded(array: torch.Tensor, fill: float) -> torch.Tensor:
        return array.masked_fill(~(mask[..., None] if array.ndim == 3 else mask), fill)

    batch = Batch(
        prompt_ids_BN=torch.ones(1, 1, dtype=torch.int64),
        prompt_mask_BN=torch.ones(1, 1, dtype=torch.int64),
        completion_ids_BT=ids,
        mask_BT=mask,
        sampled_logp_BT=padded(logp.gather(-1, ids[..., None])[..., 0] - 1, torch.nan),
        student_top_BTK=padded(student_top, -1),
        teacher_logp_BT=padded(logq.gather(-1, ids[..., None])[..., 0], torch.nan),
        teacher_top_BTK=padded(top.indices, -1),
        teacher_top_logp_BTK=padded(top.values, torch.nan),
        teacher_candidate_logp_BTM=padded(candidates, torch.nan),
    )
    return logits.requires_grad_(), batch, logq


def objective(**config) -> Objective:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Objective(LossConfig(top_k=K, **config), V, TEMPERATURE)


@pytest.mark.parametrize("support", ["student", "teacher", "intersection", "union"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_over_every_support_is_its_function_of_the_two_models(kind: LossKind, support: str) -> None:
    wired = objective(kind=kind, support=support)
    logits, batch, logq = answered(wired.wanted)
    loss = wired.loss(logits, batch)
    logp = losses.log_probs(logits, TEMPERATURE)
    function = getattr(losses, kind)
    if kind in SAMPLED:
        ids = batch.completion_ids_BT[..., None]
        expected = function(logp.gather(-1, ids)[..., 0], logq.gather(-1, ids)[..., 0], batch.mask_BT)
    elif kind in FULL_VOCABULARY:
        expected = function(logp, logq, *([0.5] if kind == "jsd" else []))
    else:
        lists = {"student": logp.topk(K).indices, "teacher": logq.topk(K).indices}
        on = (
            getattr(losses, f"{support}_support")(lists[support])
            if support in lists
            else getattr(losses, f"{support}_support")(lists["student"], lists["teacher"])
        )
        tail = [losses.log_tail(logp, on)] if kind.startswith("tail") else []
        expected = function(losses.gather(logp, on), *tail, losses.gather(logq, on), on.mask_BTS)
    torch.testing.assert_close(loss[batch.mask_BT], expected[batch.mask_BT], rtol=0, atol=1e-14)
    mean = losses.token_mean(loss, batch.mask_BT)
    (gradient,) = torch.autograd.grad(mean, logits)
    assert gradient[batch.mask_BT].isfinite().all()
    assert (gradient[~batch.mask_BT] == 0).all()
    metrics = wired.watch(logits.detach(), batch)
    assert all(value == value for value in metrics.values()), metrics


@pytest.mark.parametrize("support", ["student", "teacher", "intersection", "union"])
def test_the_support_that_is_watched_has_the_teachers_mass_in_a_whole_vocabulary_too(support: str) -> None:
    wired = objective(kind="reverse_kl", support=support)
    logits, batch, logq = answered(wired.wanted)
    tops = [losses.log_probs(logits, TEMPERATURE).topk(K).indices, logq.topk(K).indices]
    lists = {"student": tops[:1], "teacher": tops[1:]}.get(support, tops)
    on = getattr(losses, f"{support}_support")(*lists)
    mass_BT = losses.gather(logq, on).exp().sum(-1)
    metrics = wired.watch(logits.detach(), batch)
    # Means are of float32 values: half a unit in the last place of 1 is 6e-8.
    assert metrics["support_teacher_mass"] == pytest.approx(float(mass_BT[batch.mask_BT].mean()), abs=1e-7)


def test_the_entropy_by_decile_is_that_of_its_tokens_from_any_pieces() -> None:
    """A step's row has it from the sums of pieces: here of tokens 0 and 1, in deciles 2 and 3, and of 0 again, in 2."""
    wired = objective(kind="reverse_kl")
    logits, batch, _ = answered(wired.wanted)
    logits = logits.detach()
    entropy_T = monitor.entropy(*(f(losses.log_probs(logits, TEMPERATURE)) for f in (torch.exp, torch.clone)))[0]
    pieces = [
        (batch, [2, 3, -1], 2 / 3),
        (replace(batch, mask_BT=torch.tensor([[True, False, False]])), [2, -1, -1], 1 / 3),
    ]
    learnt = {"watch_s": 0.0, "skipped_steps": 0.0}
    for piece, deciles, weight in pieces:
        metrics = wired.watch(logits, replace(piece, decile_BT=torch.tensor([deciles])))
        learnt |= {name: learnt.get(name, 0.0) + weight * value for name, value in metrics.items()}
    row = full_row(1, {}, {"watch_s": 0.0}, learnt, {})
    by_decile = [row.pop(f"entropy_decile_{d}") for d in range(10)]
    # Single float32 rounding of each value: 2^-24 of entropies of at most ln 11.
    assert by_decile == pytest.approx([0, 0, float(entropy_T[0]), float(entropy_T[1]), *[0] * 6], abs=2e-7)
    assert not any("decile" in name for name in row)


def test_a_loss_asks_for_no_more_than_it_and_its_monitors_need() -> None:
    def wanted(**config) -> tuple[int, int, int]:
        needs = objective(**config).wanted
        assert needs.temperature == TEMPERATURE
        return needs.teacher_top_k, needs.student_top_k, needs.vocab_size

    assert wanted(kind="stop_gradient_reverse_kl", support="student") == (K, K, 0)
    assert wanted(kind="tail_forward_kl", support="union") == (K, K, 0)
    assert wanted(kind="stop_gradient_reverse_kl", support="teacher") == (K, 0, 0)
    assert wanted(kind="stop_gradient_reverse_kl", support="intersection") == (K, 0, 0)
    assert wanted(kind="policy_gradient") == (K, 0, 0)
    assert wanted(kind="jsd") == (K, 0, V)


def test_importance_weights_multiply_a_sampled_loss() -> None:
    # The batch's mu is p / e, so that w = e, cut at 2.
    plain, weighted = objective(kind="k2"), objective(kind="k2", importance="truncated", importance_limit=2.0)
    logits, batch, _ = answered(plain.wanted)
    torch.testing.assert_close(
        weighted.loss(logits, batch)[batch.mask_BT], 2 * plain.loss(logits, batch)[batch.mask_BT], rtol=1e-14, atol=0
    )


def test_the_biased_loss_warns_with_what_will_happen() -> None:
    with pytest.warns(UserWarning, match=r"P falls to Q / e and, with EOS in the support, completions grow"):
        Objective(LossConfig(kind="biased_reverse_kl"), V, TEMPERATURE)


def test_a_missing_teacher_log_prob_is_refused() -> None:
    wired = objective(kind="stop_gradient_reverse_kl")
    logits, batch, _ = answered(Wanted(teacher_top_k=1, student_top_k=K))
    assert batch.teacher_candidate_logp_BTM is not None
    batch.teacher_candidate_logp_BTM[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"missing \(NaN\), the first at \(0, 1, 2\)"):
        wired.loss(logits, batch)
