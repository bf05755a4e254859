import itertools
from dataclasses import dataclass, field

import pytest
import torch

from student_trainer.pipeline import Pipeline
from student_trainer.stages.opd import MAX_WEIGHT, prefix_weights


@dataclass
class Counted:
    """Steps begun, and given up."""

    begun: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def begin(self, step):
        self.begun.append(step)
        return Step(step, self.cancelled)


@dataclass
class Step:
    step: int
    cancelled: list[int]

    def cancel(self):
        self.cancelled.append(self.step)


def taken(line, step):
    begun, staleness = line.take(step)
    return begun.step, staleness


def pipeline(work, max_staleness, num_steps=7, checkpoint_every=4):
    return Pipeline(work.begin, max_staleness=max_staleness, num_steps=num_steps, checkpoint_every=checkpoint_every)


@pytest.mark.parametrize(
    ("max_staleness", "expected"),
    [(0, [0] * 7), (1, [0, 1, 1, 1, 0, 1, 1]), (2, [0, 1, 2, 2, 0, 1, 2]), (9, [0, 1, 2, 3, 0, 1, 2])],
)
def test_staleness_is_bounded_and_falls_to_0_after_each_checkpoint(max_staleness, expected):
    """Checkpoints after steps 0-3 and at the end, after 4-6."""
    work = Counted()
    line = pipeline(work, max_staleness)
    assert [taken(line, step) for step in range(7)] == list(zip(range(7), expected, strict=True))
    assert work.begun == list(range(7))
    assert not work.cancelled


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
def test_a_run_resumed_at_a_checkpoint_begins_the_same_steps_at_the_same_time(max_staleness):
    unbroken, resumed = Counted(), Counted()
    line = pipeline(unbroken, max_staleness)
    for step in range(4):
        line.take(step)
    assert unbroken.begun == [0, 1, 2, 3]  # nothing of the steps after the checkpoint
    again = pipeline(resumed, max_staleness)
    for step in range(4, 7):
        assert taken(line, step) == taken(again, step)
        assert unbroken.begun[4:] == resumed.begun


def test_a_step_back_and_the_end_give_up_what_was_begun():
    work = Counted()
    line = pipeline(work, 2)
    line.take(0)
    assert taken(line, 0) == (0, 0)
    assert work.cancelled == [0, 1, 2]
    line.give_up()
    assert work.cancelled == [0, 1, 2] * 2


def test_prefix_weights_correct_the_expectation():
    """Two tokens of two ids: E_mu[w_2 f(y_1)] = E_p[f(y_1)] by enumeration; no ratio (1.2, .8) is cut."""
    p, mu = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])
    value = torch.tensor([3.0, -1.0])  # of the loss at the second token, given the first
    total = 0.0
    for first, second in itertools.product(range(2), repeat=2):
        ids = torch.tensor([[first, second]])
        weights = prefix_weights(p.log()[ids], mu.log()[ids], torch.ones(1, 2, dtype=torch.bool))
        assert weights[0, 0] == 1
        total += float(mu[first] * mu[second] * weights[0, 1] * value[first])
    assert total == pytest.approx(0.6 * 3 - 0.4)


def test_prefix_weights_are_truncated_and_1_on_padding_and_on_policy():
    logp = torch.tensor([[-1.0, -1.0, torch.nan], [-1.0, -9.0, -1.0]])
    behaviour = torch.tensor([[-3.0, -1.0, torch.nan], [-1.0, -9.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # exp(-1 + 3) = 7.4 is above the limit
    assert prefix_weights(logp, behaviour, mask).tolist() == [[1, MAX_WEIGHT, 1], [1, 1, 1]]
