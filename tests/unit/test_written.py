"""A step's rollouts and scores come together in the rollouts' order, whichever ended or was answered first."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from threading import Timer

import numpy as np
import pytest
import torch

from protos.records import Message, ScoreResult
from student_trainer.collate import collate
from student_trainer.rollout.base import Rollout
from student_trainer.stages.written import Scoring, covered
from student_trainer.tasks import Problem
from tests.records import score_result


def rollout(number: int) -> Rollout:
    ids = np.array([number], np.int32)
    problem = Problem(str(number), (Message("user", "?"),), "")
    return Rollout(problem, ids, ids, np.zeros(1, np.float32), ids[:, None], is_finished=True, text="")


def result_of(one: Rollout) -> ScoreResult:
    return score_result(-one.completion_ids)


class Teacher:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Rollout], Future[list[ScoreResult]]]] = []

    def score(self, rollouts):
        future: Future[list[ScoreResult]] = Future()
        self.asked.append((rollouts, future))
        return future

    def answer(self, number: int) -> None:
        rollouts, future = self.asked[number]
        future.set_result([result_of(one) for one in rollouts])


def test_each_is_asked_for_as_it_ends_and_their_order_decides_nothing():
    teacher = Teacher()
    asked_before_the_next = []

    def parts():
        for places in ((3,), (0, 2), (1,)):
            yield {place: rollout(place) for place in places}
            asked_before_the_next.append(len(teacher.asked))

    scoring = Scoring(parts(), teacher.score)
    assert asked_before_the_next == [1, 2, 3]
    for number in (2, 0, 1):
        teacher.answer(number)
    assert [one.problem.id for one in scoring.rollouts] == ["0", "1", "2", "3"]
    assert [float(answer().sampled_logprobs[0]) for answer in scoring.answers] == [0, -1, -2, -3]


def test_a_micro_batch_waits_for_its_own_scores_alone():
    teacher = Teacher()
    scoring = Scoring([{2: rollout(2), 0: rollout(0)}, {1: rollout(1), 3: rollout(3)}], teacher.score)
    ids = [one.completion_ids for one in scoring.rollouts]
    batch = replace(collate(ids, ids), answers_B=scoring.answers)
    teacher.answer(0)
    first, last = batch.rows([0, 2]), next(iter(batch.rows([3]).split(1)))
    assert first.scored().teacher_logp_BT == pytest.approx(torch.tensor([[0.0], [-2.0]]))
    teacher.answer(1)
    assert last.scored().teacher_logp_BT == pytest.approx(torch.tensor([[-3.0]]))
    assert last.idle().scored().teacher_logp_BT is None
    assert last.scored().scored().answers_B is None


def test_seconds_of_writing_and_of_scores_on_their_way():
    """Nothing is on its way in two of four waits: before the first part, and between its answer and the second."""
    teacher, started = Teacher(), time.perf_counter()

    def parts():
        time.sleep(0.05)
        yield {0: rollout(0)}
        teacher.answer(0)
        time.sleep(0.05)
        yield {1: rollout(1)}

    scoring = Scoring(parts(), teacher.score)
    time.sleep(0.1)
    answer = Timer(0.05, teacher.answer, [1])
    answer.start()
    for wait in scoring.answers:
        wait()
    seconds = time.perf_counter() - started
    answer.join()
    metrics = scoring.metrics()
    assert 0.1 <= scoring.rollout_s <= seconds - 0.15
    assert 0.15 <= 2 / metrics["scored_tokens_per_s"] <= seconds - 0.1  # two tokens
    assert 0 < metrics["score_s"] <= seconds - 0.2


def test_a_sampler_that_fails_gives_up_what_was_asked():
    teacher = Teacher()

    def parts():
        yield {0: rollout(0)}
        raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError, match="not finite"):
        Scoring(parts(), teacher.score)
    assert teacher.asked[0][1].cancelled()


def test_a_union_of_intervals_counts_an_overlap_once():
    # [0, 2] and [1, 3] are 3 long together, [5, 6] is 1.
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert covered([]) == 0
