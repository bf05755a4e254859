"""Multiple-choice data sets: choices under letters, in an order that does not give the answer away."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from student_trainer.tasks import DatasetTask, build_task
from student_trainer.tasks.choices import letter_of, shuffled


def write(folder: Path, rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    path = folder / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path)}


def test_wrong_answers_in_columns_become_lettered_choices(tmp_path: Path) -> None:
    """As GPQA has them."""
    rows = [
        {
            "Question": f"{n} + 1?",
            "Correct Answer": f"{n + 1}",
            **{f"Incorrect Answer {i}": f"{n}.{i}" for i in (1, 2, 3)},
        }
        for n in range(40)
    ]
    task = build_task(
        DatasetTask(
            name="json",
            data_files=write(tmp_path, rows),
            prompt_column="Question",
            answer_column="Correct Answer",
            wrong_columns=tuple(f"Incorrect Answer {i}" for i in (1, 2, 3)),
            reward="multiple_choice",
        )
    )
    problems = [*task.train, *task.held_out]
    assert len(problems) == 40
    for problem in problems:
        question, blank, *choices = problem.messages[0].content.splitlines()
        right = str(int(question.split()[0]) + 1)
        assert (blank, len(choices)) == ("", 4)
        assert f"{problem.answer}) {right}" in choices
        assert task.reward(problem, f"The answer is {problem.answer}") == 1


def test_no_letter_is_right_more_often_than_chance() -> None:
    """Of 400 questions with four choices, 100 a letter; five standard deviations are 43."""
    letters = Counter(shuffled(f"question {n}", "right", ["one", "two", "three"])[1] for n in range(400))
    assert set(letters) == set("ABCD")
    assert all(abs(count - 100) < 43 for count in letters.values())


def test_a_list_of_choices_with_the_place_of_the_right_one(tmp_path: Path) -> None:
    """As MMLU has them."""
    rows = [{"question": f"q{n}", "choices": ["x", "y", "z"], "answer": n % 3} for n in range(20)]
    config = DatasetTask(
        name="json",
        data_files=write(tmp_path, rows),
        prompt_column="question",
        choices_column="choices",
        reward="multiple_choice",
    )
    task = build_task(config)
    by_question = {p.messages[0].content.splitlines()[0]: p for p in (*task.train, *task.held_out)}
    assert [by_question[f"q{n}"].answer for n in range(4)] == ["A", "B", "C", "A"]
    assert by_question["q0"].messages[0].content == "q0\n\nA) x\nB) y\nC) z"
    (tmp_path / "bad").mkdir()
    bad = write(tmp_path / "bad", [{"question": "q", "choices": ["x", "y"], "answer": 2}] * 2)
    with pytest.raises(ValueError, match=r"\[train\] row 0: answer: 2 is none of 2 choices"):
        build_task(config.model_copy(update={"data_files": bad}))


def test_an_answer_is_a_place_or_a_letter() -> None:
    assert (letter_of(0, 2), letter_of("1", 2), letter_of("b", 2)) == ("A", "B", "B")
    for wrong in ("C", 2, -1, "yes", ""):
        with pytest.raises(ValueError, match="is none of 2 choices"):
            letter_of(wrong, 2)


def test_choices_need_the_reward_that_reads_letters() -> None:
    with pytest.raises(ValidationError, match="reward is math: set it to multiple_choice"):
        DatasetTask(name="x", choices_column="choices")
    with pytest.raises(ValidationError, match="give one of them"):
        DatasetTask(name="x", choices_column="choices", wrong_columns=("w",), reward="multiple_choice")
