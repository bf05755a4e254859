"""The probes' measures against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from protos.records import PAD_ID, Message, ScoreResult
from student_trainer import losses
from student_trainer.collate import Batch
from student_trainer.config import LossConfig
from student_trainer.probes import consensus
from student_trainer.probes.answers import summary
from student_trainer.probes.closeness import decile_means, listed_kl, token_mean, token_measures
from student_trainer.probes.errors import first_error_of_sum
from student_trainer.probes.gradients import compare, reference_config
from student_trainer.probes.paired import Paired
from student_trainer.probes.pi import structure
from student_trainer.probes.revision import candidates, revision_mass, word_ids
from student_trainer.stages.objective import Objective
from student_trainer.study.toy import toy_tokenizer
from student_trainer.tasks import Problem
from tests.records import score_result
from tests.tiny_model import byte_tokenizer


def test_mcnemar_and_interval_of_the_articles_probe():
    """198 problems, 123 right alone and 91 on the student's prefix, 40 right to wrong and 8 wrong to right.

    p = 2 P(X <= 8), X ~ Bin(48, 1/2), from the 48th row of Pascal's triangle.
    Agresti and Min: -32 / 200 ± 1.96 sqrt(49 - 32^2 / 200) / 200 = -.16 ± .0649.
    """
    paired = Paired(both_right=83, right_to_wrong=40, wrong_to_right=8, both_wrong=67)
    row = [1]
    for _ in range(48):
        row = [1, *(a + b for a, b in pairwise(row)), 1]
    assert paired.num_problems == 198
    assert paired.difference == pytest.approx(-32 / 198)
    assert paired.p_value == pytest.approx(2 * sum(row[:9]) / sum(row))
    assert paired.p_value == pytest.approx(3.3e-6, rel=0.01)
    half = 1.959964 * math.sqrt(49 - 1024 / 200) / 200
    assert paired.interval == pytest.approx((-0.16 - half, -0.16 + half), abs=1e-6)
    assert half == pytest.approx(0.0649, abs=5e-5)


def test_mcnemar_without_a_difference_and_with_the_smallest_one():
    assert Paired.of([True, False], [True, False]) == Paired(1, 0, 0, 1)
    assert Paired(1, 0, 0, 1).p_value == 1
    assert Paired.of([True] * 5, [False] * 5).p_value == 2 / 2**5
    assert Paired.of([True, False], [False, True]).p_value == 1  # 2 (1 + 2) / 4, cut at 1


def test_answers_are_counted_among_the_well_formed_apart():
    """Of four answers one is right and readable, two are readable and wrong, one is cut short and unreadable."""
    kinds = [(True, True), (False, True), (False, True), (False, False)]
    rows = [{"is_right": right, "is_well_formed": formed, "is_finished": formed} for right, formed in kinds]
    found = summary(rows)
    assert (found["accuracy"], found["well_formed"], found["truncation_rate"]) == (0.25, 0.75, 0.25)
    assert found["accuracy_well_formed"] == pytest.approx(1 / 3)
    assert math.isnan(summary([])["accuracy"])


def result(logp_TV: np.ndarray, ids_T: np.ndarray, top_k: int, others_TM: np.ndarray, *, entropy: bool) -> ScoreResult:
    """What a model with these log-probs answers."""
    order = np.argsort(-logp_TV, -1)[:, :top_k]
    at = np.take_along_axis
    return score_result(
        at(logp_TV, ids_T[:, None], -1)[:, 0],
        top_ids=order.astype(np.int32),
        top_logprobs=at(logp_TV, order, -1).astype(np.float32),
        candidate_logprobs=at(logp_TV, others_TM, -1).astype(np.float32),
        entropy=-(np.exp(logp_TV) * logp_TV).sum(-1).astype(np.float32) if entropy else None,
    )


def pair(p, q, top_k: int, sampled: int = 0, *, entropy: bool = True) -> tuple[ScoreResult, ScoreResult]:
    """Both models at one token, each scored at the other's top ids."""
    logp, logq = np.log(np.array([p])), np.log(np.array([q]))
    ids = np.array([sampled])
    tops = [np.argsort(-one, -1)[:, :top_k] for one in (logp, logq)]
    return (
        result(logp, ids, top_k, tops[1], entropy=entropy),
        result(logq, ids, top_k, tops[0], entropy=entropy),
    )


def test_closeness_over_a_whole_vocabulary_is_exact():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 ln 2 - 1/4 ln 2 both ways; H = 3/2 ln 2 both."""
    found = token_measures(*pair([0.5, 0.25, 0.25], [0.25, 0.25, 0.5], 3))
    assert found["reverse_kl_listed"] == pytest.approx([0.25 * math.log(2)], abs=2e-6)
    assert found["forward_kl_listed"] == pytest.approx([0.25 * math.log(2)], abs=2e-6)
    assert found["reverse_kl"] == pytest.approx([math.log(2)], abs=1e-6)
    assert found["teacher_advantage"] == pytest.approx([-math.log(2)], abs=1e-6)
    assert found["entropy_gap"] == pytest.approx([0], abs=1e-6)
    assert found["student_entropy"] == pytest.approx([1.5 * math.log(2)], abs=1e-6)
    assert found["overlap_ratio"] == [1]


def test_closeness_over_lists_has_the_rest_as_one_outcome():
    """Top-1 of p is id 0, of q id 2; ids 1 and 3 are the rest: p has .3 there and q .2.

    KL(p || q) over {0, 2, rest} = .6 ln(.6/.1) + .1 ln(.1/.7) + .3 ln(.3/.2).
    """
    p, q = [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]
    found = token_measures(*pair(p, q, 1, entropy=False))
    assert found["reverse_kl_listed"] == pytest.approx(
        [0.6 * math.log(6) + 0.1 * math.log(1 / 7) + 0.3 * math.log(1.5)], abs=1e-6
    )
    assert found["forward_kl_listed"] == pytest.approx(
        [0.1 * math.log(1 / 6) + 0.7 * math.log(7) + 0.2 * math.log(2 / 3)], abs=1e-6
    )
    assert found["reverse_kl_listed"][0] < sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found["overlap_ratio"] == [0]
    assert found["overlap_student_mass"] == [0]
    assert np.isnan(found["entropy_gap"]).all()


def test_an_id_in_both_lists_counts_once():
    """Both top-2 lists are ids 0 and 1; their mass is .9 and .8."""
    found = token_measures(*pair([0.5, 0.4, 0.1], [0.4, 0.4, 0.2], 2))
    expected = 0.5 * math.log(5 / 4) + 0.1 * math.log(1 / 2)
    assert found["reverse_kl_listed"] == pytest.approx([expected], abs=1e-6)
    assert found["overlap_student_mass"] == pytest.approx([0.9])
    assert found["overlap_teacher_mass"] == pytest.approx([0.8])


def test_a_listed_divergence_is_finite_where_a_model_has_no_tail():
    """p has 1 - P = 0 outside and q .5: nothing of p is there to compare; the other way the ratio is cut at 1e-6."""
    logp, logq = np.array([[0.0]]), np.log(np.array([[0.5]]))
    assert listed_kl(logp, logq) == pytest.approx([math.log(2)], abs=2e-5)
    assert listed_kl(logq, logp) == pytest.approx([0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-6)])


def test_a_token_mean_weighs_tokens_and_its_interval_counts_rollouts():
    """Rollouts (1, 1) and (4): mean 6 / 3 = 2; residuals 2 - 4 and 4 - 2: error sqrt(8 * 2 / 1) / 3 = 4 / 3."""
    found = token_mean([np.array([1.0, 1.0]), np.array([4.0])])
    assert found.value == 2
    assert found.high - found.value == pytest.approx(1.959964 * 4 / 3, rel=1e-6)
    assert math.isnan(token_mean([np.ones(3)]).low)


def test_decile_means_are_by_position():
    """Twenty tokens, value = tenth; a rollout of one token stands in the first tenth alone."""
    twenty = np.repeat(np.arange(10, dtype=np.float64), 2)
    assert decile_means([twenty]) == pytest.approx(list(range(10)))
    assert decile_means([twenty, np.array([3.0])])[0] == pytest.approx(1)  # (0 + 0 + 3) / 3
    assert np.isnan(decile_means([np.array([3.0])])[1:]).all()


def logs(*rows) -> np.ndarray:
    """log of M distributions at one token, [M, 1, S]."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float64))[:, None]


def test_the_geometric_mean_and_its_floor():
    """(.8, .2) and (.2, .8): sqrt(.16) = .4 each, so Z = .8 and g = (1/2, 1/2); equal teachers have floor 0."""
    g, floor = consensus.geometric_mean(logs([0.8, 0.2], [0.2, 0.8]))
    assert np.exp(g) == pytest.approx(np.array([[0.5, 0.5]]))
    assert floor == pytest.approx([-math.log(0.8)])
    g, floor = consensus.geometric_mean(logs([0.7, 0.3], [0.7, 0.3], [0.7, 0.3]))
    assert np.exp(g) == pytest.approx(np.array([[0.7, 0.3]]))
    assert floor == pytest.approx([0], abs=1e-12)


def test_the_geometric_mean_is_where_the_mean_reverse_kl_is_least():
    """At g the mean divergence is the floor; anywhere else it is above."""
    teachers = logs([0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.3, 0.3, 0.4])
    g, floor = consensus.geometric_mean(teachers)
    assert consensus.kl(np.broadcast_to(g, teachers.shape), teachers).mean(0) == pytest.approx(floor)
    moved = np.log(np.exp(g) + np.array([[0.01, -0.01, 0.0]]))
    assert consensus.kl(np.broadcast_to(moved, teachers.shape), teachers).mean(0) > floor + 1e-5


@pytest.mark.parametrize(("num_pis", "hedge"), [(2, 0.105), (5, 0.254), (10, 0.351), (50, 0.461)])
def test_a_hedge_that_all_teachers_allow_grows_in_their_consensus(num_pis: int, hedge: float):
    """Each of M teachers gives its own answer .9, a hedge .05, and .05 evenly to the others' answers: in the mean the
    hedge keeps .05, and each answer (.9 (.05 / (M - 1))^(M - 1))^(1/M).
    """
    other = 0.05 / (num_pis - 1)
    rows = [[0.9 if i == j else other for j in range(num_pis)] + [0.05] for i in range(num_pis)]
    g, _ = consensus.geometric_mean(logs(*rows))
    answer = (0.9 * other ** (num_pis - 1)) ** (1 / num_pis)
    assert np.exp(g[0, -1]) == pytest.approx(0.05 / (0.05 + num_pis * answer))
    assert np.exp(g[0, -1]) == pytest.approx(hedge, abs=5e-4)


def test_disagreement_is_log_m_for_certain_teachers_and_zero_for_equal_ones():
    assert consensus.disagreement(logs([1, 0, 0], [0, 1, 0], [0, 0, 1])) == pytest.approx([math.log(3)])
    assert consensus.disagreement(logs([0.4, 0.6], [0.4, 0.6])) == pytest.approx([0], abs=1e-12)


def test_the_rest_of_a_vocabulary_is_one_more_outcome():
    """Two of three ids listed: .5 and .3 leave .2; a padded entry has nothing."""
    logp = consensus.with_tail(logs([0.5, 0.3, 0.0]))
    assert np.exp(logp) == pytest.approx(np.array([[[0.5, 0.3, 0.0, 0.2]]]))


def test_what_a_student_can_keep_and_what_the_pi_is():
    assert consensus.share_kept(2.0, 0.0) == 1
    assert consensus.share_kept(2.0, 0.5) == 0.75
    assert consensus.share_kept(2.0, 3.0) == 0
    assert math.isnan(consensus.share_kept(0.0, 0.0))
    assert structure(1.0, 1.0) == "shared rule"
    assert structure(1.0, 0.0) == "instance-specific"
    assert structure(1.0, 0.5) == "mixed"
    assert structure(0.001, 1.0) == "no effect"


def test_hedge_words_are_found_as_whole_tokens():
    """The toy tokenizer has "w" as a token; of bytes, none is a word of several letters."""
    toy = toy_tokenizer()
    assert word_ids(["w"], toy) == [toy.convert_tokens_to_ids("w")]
    assert word_ids(["wait", "but"], byte_tokenizer()) == []
    assert candidates([], 2).tolist() == [[PAD_ID], [PAD_ID]]
    mass = revision_mass(np.log(np.array([[0.25, 0.5], [0.125, np.nan]], np.float32)))
    assert mass == pytest.approx([0.75, 0.125])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("3+5=8;8+7=15;m15", None),
        ("m15", None),
        ("3+5=", None),
        ("", None),
        ("3+5=9w8;", 4),
        ("3+5=8;8+7=25;", 10),
        ("3+5=8;8+6=", 8),
        ("3+5=8;8+7=15;m16", 15),
        ("m16", 2),
        ("3+5=8;8+7=15;m15;", 16),
    ],
)
def test_the_first_error_of_a_sum_is_its_first_wrong_character(text: str, place: int | None):
    problem = Problem("p", (Message("user", "3+5+7\n\n15"),), "15")
    assert first_error_of_sum(problem, text) == place


V, K = 7, 3


def batch_of(logits: torch.Tensor, logq: torch.Tensor, width: int = V) -> Batch:
    """One rollout of as many tokens as rows, everything that a loss of any kind asks for."""
    logp = losses.log_probs(logits, 1.0)
    num_tokens = logits.shape[1]
    ids = torch.arange(num_tokens)[None] % V
    student_top, top = logp.topk(width).indices, logq.topk(width)
    return Batch(
        prompt_ids_BN=torch.ones(1, 1, dtype=torch.int64),
        prompt_mask_BN=torch.ones(1, 1, dtype=torch.int64),
        completion_ids_BT=ids,
        mask_BT=torch.ones(1, num_tokens, dtype=torch.bool),
        sampled_logp_BT=logp.gather(-1, ids[..., None])[..., 0],
        student_top_BTK=student_top,
        teacher_logp_BT=logq.gather(-1, ids[..., None])[..., 0],
        teacher_top_BTK=top.indices,
        teacher_top_logp_BTK=top.values,
        teacher_candidate_logp_BTM=logq.gather(-1, student_top),
    )


def gradient_figures(kind: str, top_k: int, *, same: bool = False, width: int = V):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 1, 5, V, generator=generator, dtype=torch.float64)
    logq = losses.log_probs(logits if same else teacher, 1.0)
    config = LossConfig.model_validate({"kind": kind, "top_k": top_k})
    objective, reference = (Objective(one, V, 1.0) for one in (config, reference_config(config, width, V)))
    batch = batch_of(logits, logq, width)
    return compare(objective, reference, logits, batch).figures(), logits, logq


@pytest.mark.filterwarnings("ignore:biased_reverse_kl is for study")
def test_the_unnormalised_loss_leaks_by_exactly_the_gradient_of_its_mass():
    """Its self-gradient at each token is grad P, p_j (m_j - P), and what is left is the stop-gradient loss's."""
    figures, logits, logq = gradient_figures("biased_reverse_kl", K)
    logp = losses.log_probs(logits, 1.0)
    support = losses.student_support(logp.topk(K).indices)
    p, mask = logp.exp(), torch.zeros(1, 5, V).scatter(-1, support.ids_BTS, 1.0)
    mass = (p * mask).sum(-1, keepdim=True)
    ratio = logp - logq
    pull = p * (mask * ratio - (p * mask * ratio).sum(-1, keepdim=True))
    assert figures["leaks"]
    assert figures["self_norm"] == pytest.approx(float((p * (mask - mass)).norm(dim=-1).mean()))
    assert figures["bias_ratio"] == pytest.approx(
        float((p * (mask - mass)).norm(dim=-1).mean() / pull.norm(dim=-1).mean())
    )
    assert figures["student_mass"] == pytest.approx(float(mass.mean()))


@pytest.mark.filterwarnings("ignore:biased_reverse_kl is for study")
@pytest.mark.parametrize(
    "kind", ["biased_reverse_kl", "stop_gradient_reverse_kl", "tail_reverse_kl", "tail_forward_kl"]
)
def test_over_the_whole_vocabulary_every_loss_has_the_full_gradient(kind: str):
    figures, _, _ = gradient_figures(kind, V)
    assert figures["cosine"] == pytest.approx(1)
    assert figures["cosine_per_token"] == pytest.approx(1)
    assert figures["relative_norm"] == pytest.approx(1)
    assert not figures["leaks"]


@pytest.mark.parametrize(
    "kind", ["stop_gradient_reverse_kl", "tail_reverse_kl", "renormalised_reverse_kl", "renormalised_forward_kl"]
)
def test_a_loss_that_rests_at_the_teacher_does_not_leak(kind: str):
    figures, _, _ = gradient_figures(kind, K)
    assert not figures["leaks"]
    assert figures["self_norm"] < 1e-12
    assert figures["cosine"] < 1
    alike, _, _ = gradient_figures(kind, K, same=True)
    assert alike["pull_norm"] < 1e-12
    assert alike["cosine"] == 1


def test_lists_narrower_than_the_vocabulary_stand_for_it_with_a_tail():
    config = LossConfig(top_k=K)
    assert reference_config(config, V, V).kind == "reverse_kl"
    wide = reference_config(config, V - 1, V)
    assert (wide.kind, wide.support, wide.top_k) == ("tail_reverse_kl", "union", V - 1)
    assert reference_config(LossConfig(kind="k3"), V, V).kind == "forward_kl"
    figures, _, _ = gradient_figures("stop_gradient_reverse_kl", K, width=V - 1)
    exact, _, _ = gradient_figures("stop_gradient_reverse_kl", K)
    # One id outside both lists at most: the tail is that id, and the gradient the whole vocabulary's.
    assert figures["cosine"] == pytest.approx(exact["cosine"], abs=0.01)
