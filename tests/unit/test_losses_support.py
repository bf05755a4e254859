import math

import pytest
import torch

from student_trainer.losses import (
    Support,
    align,
    full_vocabulary,
    gather,
    intersection_support,
    log_probs,
    log_tail,
    stop_gradient_reverse_kl,
    student_support,
    teacher_support,
    union_support,
)

NAN = math.nan
NO_IDS, NO_LOGP = torch.empty(1, 2, 0, dtype=torch.int32), torch.empty(1, 2, 0)

# Two tokens; the second is padding. The student's list holds one PAD_ID.
STUDENT_IDS = torch.tensor([[[7, 2, -1], [-1, -1, -1]]], dtype=torch.int32)
TEACHER_IDS = torch.tensor([[[2, 5], [-1, -1]]], dtype=torch.int32)
CANDIDATE_LOGP = torch.tensor([[[-7.0, -2.0, NAN], [NAN, NAN, NAN]]])
TOP_LOGP = torch.tensor([[[-2.0, -5.0], [NAN, NAN]]])


def assert_equal(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_supports_of_one_owner_mask_padding() -> None:
    student = student_support(STUDENT_IDS)
    assert student.ids_BTS.dtype == torch.int64
    assert_equal(student.mask_BTS, [[[True, True, False], [False, False, False]]])
    assert_equal(teacher_support(TEACHER_IDS).mask_BTS, [[[True, True], [False, False]]])


def test_the_union_counts_each_id_once() -> None:
    union = union_support(STUDENT_IDS, TEACHER_IDS)
    assert_equal(union.ids_BTS, [[[7, 2, -1, 2, 5], [-1, -1, -1, -1, -1]]])
    assert_equal(union.mask_BTS, [[[True, True, False, False, True], [False] * 5]])


def test_a_repeated_id_in_one_list_counts_once() -> None:
    assert_equal(student_support(torch.tensor([[[4, 4, 1, 4]]])).mask_BTS, [[[True, False, True, False]]])


def test_the_union_of_random_lists_is_the_set_union() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 3, 5, 12, generator=generator).topk(6).indices
    union = union_support(student, teacher)
    for b in range(3):
        for t in range(5):
            counted = union.ids_BTS[b, t][union.mask_BTS[b, t]].tolist()
            assert len(counted) == len(set(counted))
            assert set(counted) == set(student[b, t].tolist()) | set(teacher[b, t].tolist())


def test_union_weighs_a_shared_id_once_in_the_loss() -> None:
    # p = [1/2, 1/4, 1/4], q = [1/4, 1/2, 1/4]; student's list {0, 1}, teacher's {1, 0}: 1/2 ln 2 - 1/4 ln 2.
    logp = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    logq = torch.tensor([[[0.25, 0.5, 0.25]]], dtype=torch.float64).log()
    union = union_support(torch.tensor([[[0, 1]]]), torch.tensor([[[1, 0]]]))
    loss = stop_gradient_reverse_kl(gather(logp, union), gather(logq, union), union.mask_BTS)
    assert loss.item() == pytest.approx(math.log(2) / 4, abs=1e-15)


def test_the_intersection_of_random_lists_is_the_set_intersection_in_the_students_order() -> None:
    student, teacher = torch.rand(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)).topk(6).indices
    shared = intersection_support(student, teacher)
    for b in range(3):
        for t in range(5):
            both = [i for i in student[b, t].tolist() if i in teacher[b, t].tolist()]
            assert shared.ids_BTS[b, t][shared.mask_BTS[b, t]].tolist() == both


def test_an_intersection_holds_neither_padding_nor_repeated_ids_and_can_be_empty() -> None:
    student, teacher = torch.tensor([[[4, 4, -1], [1, 2, 3]]]), torch.tensor([[[-1, 4], [5, 6]]])
    assert_equal(intersection_support(student, teacher).mask_BTS, [[[True, False, False], [False] * 3]])


def test_log_tail_is_what_the_support_leaves_and_keeps_its_digits() -> None:
    # p = [1 - 3e-12, 1e-12, 2e-12]: in float32 1 - P is 0, the sum over the ids outside is not.
    logp = log_probs(torch.tensor([[[0.0, math.log(1e-12), math.log(2e-12)]]], requires_grad=True), 1.0)
    tails = [log_tail(logp, student_support(torch.tensor([[ids]]))) for ids in ([0, -1], [0, 2], [-1, -1])]
    assert [t.item() for t in tails] == pytest.approx([math.log(3e-12), math.log(1e-12), 0.0], rel=1e-6, abs=1e-7)
    (gradient,) = torch.autograd.grad(tails[0].sum(), logp)
    assert gradient[0, 0].tolist() == pytest.approx([0.0, 1 / 3, 2 / 3], rel=1e-5)


def test_nothing_is_outside_the_whole_vocabulary() -> None:
    logp = log_probs(torch.zeros(1, 1, 3, requires_grad=True), 1.0)
    tail = log_tail(logp, student_support(torch.tensor([[[2, 0, 1]]])))
    assert tail.item() == -math.inf
    assert torch.autograd.grad(tail.exp().sum(), logp)[0].tolist() == [[[0.0, 0.0, 0.0]]]


def test_gather_reads_the_ids_and_gives_masked_entries_no_mass_and_no_gradient() -> None:
    logp = torch.tensor([[[-1.0, -2.0, -3.0]]], requires_grad=True)
    gathered = gather(logp, student_support(torch.tensor([[[2, -1, 1]]])))
    assert_equal(gathered.detach(), [[[-3.0, -math.inf, -2.0]]])
    (gradient,) = torch.autograd.grad(gathered[..., [0, 2]].sum() + gathered.exp().sum(), logp)
    # d(logp + exp logp) = 1 + p on ids 1 and 2, nothing on id 0, which only the masked entry could have read.
    torch.testing.assert_close(gradient, torch.tensor([[[0.0, 1 + math.exp(-2), 1 + math.exp(-3)]]]))


@pytest.mark.parametrize("wrong_id", [3, -2])
def test_gather_refuses_an_id_outside_the_vocabulary(wrong_id: int) -> None:
    with pytest.raises(ValueError, match=rf"id {wrong_id} at \(0, 0, 1\) is outside the vocabulary of 3"):
        gather(torch.zeros(1, 1, 3), student_support(torch.tensor([[[0, wrong_id]]])))


def test_student_support_takes_the_candidates_log_probs() -> None:
    aligned = align(student_support(STUDENT_IDS), STUDENT_IDS, CANDIDATE_LOGP, NO_IDS, NO_LOGP)
    assert_equal(aligned, [[[-7.0, -2.0, NAN], [NAN, NAN, NAN]]])


def test_teacher_support_takes_the_top_log_probs() -> None:
    aligned = align(teacher_support(TEACHER_IDS), NO_IDS, NO_LOGP, TEACHER_IDS, TOP_LOGP)
    assert_equal(aligned, [[[-2.0, -5.0], [NAN, NAN]]])


def test_union_takes_both_in_the_order_of_its_ids() -> None:
    union = union_support(STUDENT_IDS, TEACHER_IDS)
    aligned = align(union, STUDENT_IDS, CANDIDATE_LOGP, TEACHER_IDS, TOP_LOGP)
    assert_equal(aligned, [[[-7.0, -2.0, NAN, NAN, -5.0], [NAN] * 5]])


def test_align_does_not_depend_on_the_order_of_the_reply() -> None:
    support = student_support(STUDENT_IDS)
    flipped = align(support, STUDENT_IDS.flip(-1), CANDIDATE_LOGP.flip(-1), NO_IDS, NO_LOGP)
    assert_equal(flipped, [[[-7.0, -2.0, NAN], [NAN, NAN, NAN]]])


def test_an_id_the_reply_does_not_hold_is_missing_and_the_loss_refuses_it() -> None:
    # The teacher's list alone cannot answer for the student's id 7.
    support = student_support(STUDENT_IDS)
    aligned = align(support, NO_IDS, NO_LOGP, TEACHER_IDS, TOP_LOGP)
    assert_equal(aligned, [[[NAN, -2.0, NAN], [NAN, NAN, NAN]]])
    with pytest.raises(ValueError, match=r"1 of 2 .* the first at \(0, 0, 0\)"):
        stop_gradient_reverse_kl(torch.full((1, 2, 3), -1.0), aligned, support.mask_BTS)


def test_a_candidate_without_a_log_prob_is_not_rescued_by_the_top_list() -> None:
    support = Support(torch.tensor([[[2]]]), torch.tensor([[[True]]]))
    ids, nan = torch.tensor([[[2]]]), torch.tensor([[[NAN]]])
    assert_equal(align(support, ids, nan, ids, torch.tensor([[[-2.0]]])), [[[NAN]]])


def test_align_refuses_log_probs_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"candidate_logp_BTM has shape \(1, 2, 2\)"):
        align(student_support(STUDENT_IDS), STUDENT_IDS, CANDIDATE_LOGP[..., :2], NO_IDS, NO_LOGP)


def test_full_vocabulary_restores_the_order_and_fills_padding_with_the_uniform_distribution() -> None:
    ids = torch.tensor([[[2, 0, 1], [-1, -1, -1]]], dtype=torch.int32)
    logp = torch.tensor([[[-0.2, -2.0, -3.0], [NAN, NAN, NAN]]])
    uniform = -math.log(3)
    assert_equal(
        full_vocabulary(ids, logp, torch.tensor([[True, False]])), [[[-2.0, -3.0, -0.2], [uniform, uniform, uniform]]]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2, 0, 2], r"position \(0, 1\) holds 2 distinct ids of 3: 1 is missing"),
        ([2, 0, -1], r"id -1 at \(0, 1, 2\) is outside the vocabulary of 3"),
        ([2, 0, 3], r"id 3 at \(0, 1, 2\) is outside the vocabulary of 3"),
    ],
)
def test_full_vocabulary_refuses_a_row_that_is_not_a_permutation(row: list[int], message: str) -> None:
    ids = torch.tensor([[[0, 1, 2], row]])
    with pytest.raises(ValueError, match=message):
        full_vocabulary(ids, torch.zeros(1, 2, 3), torch.tensor([[True, True]]))
    full_vocabulary(ids, torch.zeros(1, 2, 3), torch.tensor([[True, False]]))


def test_full_vocabulary_refuses_a_missing_log_prob() -> None:
    logp = torch.tensor([[[-1.0, NAN], [NAN, NAN]]])
    with pytest.raises(ValueError, match=r"1 of 2 .* the first at \(0, 0, 1\)"):
        full_vocabulary(torch.tensor([[[1, 0], [1, 0]]]), logp, torch.tensor([[True, False]]))
