"""The alarms on a loss that really leaks, beside a run that differs in its loss alone: real steps, a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer.run_folder import read_rows
from student_trainer.study.collapse import BIASED, ROLLING_BACK, STABLE, WARNING, Collapse, Sizes
from tests.harness import LoopThread, served

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:biased_reverse_kl is for study:UserWarning")]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Collapse:
    """The study's, ended soon after its alarm."""
    return Collapse(tmp_path_factory.mktemp("collapse"), seed=0, sizes=Sizes(steps=50))


@pytest.fixture(scope="module")
def student_and_url(run: LoopThread, experiment: Collapse) -> Iterator[tuple[Path, str]]:
    teacher, student = experiment.teacher_and_student()
    with served(run, teacher) as url:
        yield student, url


def test_on_the_stop_gradient_loss_no_default_rule_sounds(
    experiment: Collapse, student_and_url: tuple[Path, str]
) -> None:
    stable = experiment.distil("stop-gradient", *student_and_url, STABLE, WARNING)
    assert stable.alarms == {}
    assert stable.half_step is None
    assert stable.reward_half_step is None


def test_on_the_biased_loss_a_default_rule_rolls_back_before_the_answers_are_half_as_good(
    experiment: Collapse, student_and_url: tuple[Path, str]
) -> None:
    """And the run goes on with the stop-gradient loss, under which nothing sounds and the answers stay good."""
    course = experiment.distil("rolled-back", *student_and_url, BIASED, ROLLING_BACK)
    run = experiment.out / "rolled-back"
    (roll_back,) = read_rows(run / "roll_backs.jsonl")
    (alarm,) = read_rows(run / "alarms.jsonl")
    assert alarm["action"] == "roll_back"
    assert alarm["signal"] == "reverse_kl"
    # From before the ten steps whose mean the rule is of.
    assert roll_back["from_step"] == alarm["step"]
    assert roll_back["to_step"] <= alarm["step"] - 10
    assert roll_back["loss"]["kind"] == "stop_gradient_reverse_kl"
    undone = read_rows(run / "rolled_back.jsonl")
    assert all(row["eval/accuracy"] >= course.peak / 2 for row in undone if "eval/accuracy" in row)
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == experiment.sizes.steps
    assert course.half_step is None
    assert course.reward_half_step is None
    assert course.last >= course.peak / 2
