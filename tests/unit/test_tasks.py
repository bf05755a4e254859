"""Tasks: no prompt on both sides, and one clear error for each thing wrong with the data."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from protos.records import Message
from student_trainer.tasks import (
    DatasetTask,
    JsonlTask,
    Problem,
    ReasoningGymTask,
    SplitTask,
    TaskConfig,
    ToyTask,
    build_task,
)
from student_trainer.tasks.problem import check_disjoint, distinct, is_held_out, prompt_key, split


def problem(name: str, prompt: str, *, system: str | None = None) -> Problem:
    messages = (Message("user", prompt),)
    return Problem(name, (Message("system", system), *messages) if system else messages, answer="1")


def split_task(train: list[Problem], held_out: list[Problem]) -> SplitTask:
    return SplitTask("t", train, held_out, score=lambda *_: 0.0, well_formed=lambda *_: True)


def keys(problems: Any) -> set[str]:
    return {prompt_key(one.messages) for one in problems}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} + 1?", "answer": n + 1, "solution": f"{n}+1={n + 1}"} for n in range(start, stop)]


# -- Splits --------------------------------------------------------------------------------------------------------


def test_the_same_question_has_the_same_key() -> None:
    plain = problem("a", "What is 1 + 1?")
    assert keys([plain, problem("b", " what  IS\n1 + 1?"), problem("c", "What is 1 + 1?", system="Be brief.")]) == keys(
        [plain]
    )
    assert keys([plain]) != keys([problem("d", "What is 1 + 2?")])


def test_turns_do_not_run_together() -> None:
    one = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    other = [Message("user", "a"), Message("assistant", "b c"), Message("user", "")]
    assert prompt_key(one) != prompt_key(other)


def test_a_shared_prompt_is_refused_by_name() -> None:
    train = [problem("train-0", "one"), problem("train-1", "two")]
    held_out = [problem("held_out-0", "three"), problem("held_out-1", "TWO", system="x"), problem("held_out-2", "one")]
    with pytest.raises(ValueError, match=r"held_out-1 is also train problem train-1: 'TWO'"):
        split_task(train, held_out)


def test_sides_need_problems_and_ids_must_differ() -> None:
    with pytest.raises(ValueError, match="1 train and 0 held-out"):
        split_task([problem("a", "one")], [])
    with pytest.raises(ValueError, match="2 problems have 1 different ids"):
        split_task([problem("a", "one")], [problem("a", "two")])


@given(prompts=st.lists(st.text(max_size=3)), fraction=st.floats(0.05, 0.95))
def test_a_split_shares_nothing_and_loses_nothing(prompts: list[str], fraction: float) -> None:
    problems = distinct(problem(str(i), prompt) for i, prompt in enumerate(prompts))
    train, held_out = split(problems, fraction)
    check_disjoint(train, held_out)
    assert len({one.id for one in (*train, *held_out)}) == len(problems) == len(keys(problems))


@given(prompts=st.lists(st.text(), min_size=1, unique=True), data=st.data())
def test_a_prompt_keeps_its_side_whatever_the_rest(prompts: list[str], data: st.DataObject) -> None:
    problems = [problem(str(i), prompt) for i, prompt in enumerate(prompts)]
    some = data.draw(st.lists(st.sampled_from(problems), unique_by=id))
    held_out = {one.id for one in split(problems, 0.5)[1]}
    assert {one.id for one in split(some, 0.5)[1]} == held_out & {one.id for one in some}


def test_the_fraction_is_kept() -> None:
    held_out = sum(is_held_out(prompt_key([Message("user", str(n))]), 0.2) for n in range(10_000))
    assert held_out == pytest.approx(2000, abs=160)  # four standard deviations of a binomial(10000, .2): 4 * 40


def test_the_first_of_repeated_prompts_is_kept() -> None:
    kept = distinct([problem("a", "one"), problem("b", "two"), problem("c", "ONE")])
    assert [one.id for one in kept] == ["a", "b"]


# -- Configuration -------------------------------------------------------------------------------------------------


def test_the_kind_chooses_the_model() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(TaskConfig)
    assert adapter.validate_python({"kind": "toy", "max_terms": 4}) == ToyTask(max_terms=4)
    assert isinstance(adapter.validate_python({"kind": "dataset", "name": "x"}), DatasetTask)
    with pytest.raises(ValidationError, match="max_term"):
        adapter.validate_python({"kind": "toy", "max_term": 4})


@pytest.mark.parametrize("model", [JsonlTask, DatasetTask, ReasoningGymTask, ToyTask])
def test_every_setting_is_described(model: type[Any]) -> None:
    fields = {name: field for name, field in model.model_fields.items() if name != "kind"}
    assert fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_configuration_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "reasoning_gym", "math_verify")
    program = f"import sys, student_trainer.tasks; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- JSON Lines ----------------------------------------------------------------------------------------------------


def test_jsonl_with_two_files(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", sums(0, 5))
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 9 + 1?"}]
    held_out = write_jsonl(tmp_path / "test.jsonl", [{"messages": chat, "answer": "10", "reference": "easy"}])
    task = build_task(JsonlTask(path=train, held_out_path=held_out, reward="number", system="Be brief."))

    brief = Message("system", "Be brief.")
    assert task.train[3] == Problem("train-3", (brief, Message("user", "What is 3 + 1?")), "4", "3+1=4")
    assert task.held_out[0].messages == (brief, Message("system", "s"), Message("user", "What is 9 + 1?"))
    assert task.held_out[0].reference == "easy"
    assert task.reward(task.train[3], "It is 4.0") == 1.0
    assert task.reward(task.train[3], "It is 5") == 0.0
    assert task.is_well_formed(task.train[3], "It is 5")
    assert not task.is_well_formed(task.train[3], "I do not know")


def test_jsonl_with_one_file_is_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", sums(0, 50) + sums(20, 60))
    task = build_task(JsonlTask(path=path, held_out_fraction=0.3, reward="number"))
    assert len(task.train) + len(task.held_out) == 60
    assert len(keys(task.train) | keys(task.held_out)) == 60
    assert 0 < len(task.held_out) < 60


def test_jsonl_files_that_share_a_prompt_are_refused(tmp_path: Path) -> None:
    train, held_out = write_jsonl(tmp_path / "a", sums(0, 5)), write_jsonl(tmp_path / "b", sums(4, 6))
    with pytest.raises(ValueError, match=r"held_out-0 is also train problem train-4: 'What is 4 \+ 1\?'"):
        build_task(JsonlTask(path=train, held_out_path=held_out, reward="number"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", ": not JSON: "),
        ("[1, 2]", ": a JSON list, not an object"),
        ('{"answer": "1"}', ": give one of `prompt` and `messages`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "answer": "1"}', ": give one of"),
        ('{"prompt": "", "answer": "1"}', ": prompt: "),
        ('{"prompt": 5, "answer": "1"}', ": prompt: "),
        ('{"messages": [], "answer": "1"}', ": messages: "),
        ('{"messages": [{"role": "robot", "content": "a"}], "answer": "1"}', ": messages.0.role: "),
        ('{"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}', "the last must be 'user'"),
        ('{"prompt": "a"}', ": answer: "),
        ('{"prompt": "a", "answer": null}', ": answer: None is neither"),
        ('{"prompt": "a", "answer": true}', ": answer: True is neither"),
        ('{"prompt": "a", "answer": NaN}', ": answer: nan is neither"),
        ('{"prompt": "a", "answer": "five"}', ": answer: 'five' is not one number"),
        ('{"prompt": "a", "answer": 1, "reference": 7}', ": reference: "),
        ('{"prompt": "a", "answer": 1, "reference": "x", "solution": "y"}', ": solution: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine", "answer": 1}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:3") as raised:
        build_task(JsonlTask(path=path, reward="number"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        build_task(JsonlTask(path=tmp_path / "absent.jsonl"))


# -- Hugging Face data sets ----------------------------------------------------------------------------------------


def test_a_data_set_of_parquet_files(tmp_path: Path) -> None:
    from datasets import Dataset

    for side, numbers in {"train": range(8), "test": range(8, 12)}.items():
        rows = [{"question": f"{n} + 1 = ?", "answer": f"It is simple.\n#### {n + 1}"} for n in numbers]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{side}-00000-of-00001.parquet")
    config = DatasetTask(
        name=str(tmp_path),
        held_out_split="test",
        prompt_column="question",
        answer_mark="####",
        reference_column="answer",
        reward="number",
    )
    task = build_task(config)
    assert [one.answer for one in task.held_out] == ["9", "10", "11", "12"]
    assert task.train[0] == Problem("train-0", (Message("user", "0 + 1 = ?"),), "1", "It is simple.\n#### 1")

    with pytest.raises(ValueError, match=r"prompt_column 'prompt' is not one of \['question', 'answer'\]"):
        build_task(config.model_copy(update={"prompt_column": "prompt"}))
    with pytest.raises(ValueError, match=r"\[train\] row 0: answer: no answer_mark '&&'"):
        build_task(config.model_copy(update={"answer_mark": "&&"}))


def test_a_data_set_of_json_chats_is_split(tmp_path: Path) -> None:
    rows = [{"chat": [{"role": "user", "content": f"{n} + 1 = ?"}], "answer": n + 1} for n in range(40)]
    path = write_jsonl(tmp_path / "chats.json", rows)
    config = DatasetTask(
        name="json", data_files={"train": str(path)}, prompt_column="chat", held_out_fraction=0.25, reward="number"
    )
    task = build_task(config)
    assert len(task.train) + len(task.held_out) == 40
    check_disjoint(task.train, task.held_out)
    assert task.reward(task.held_out[0], task.held_out[0].answer) == 1.0


# -- reasoning-gym -------------------------------------------------------------------------------------------------


def test_neighbouring_seeds_of_reasoning_gym_share_problems() -> None:
    """Why the two sides' seeds are kept apart."""
    import reasoning_gym

    one, next_one = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=5) for seed in (7, 8))
    assert one[3]["question"] == next_one[2]["question"]


def test_reasoning_gym_sides_share_nothing() -> None:
    config = ReasoningGymTask(name="chain_sum", train_size=60, held_out_size=30, seed=3)
    task = build_task(config)
    assert (len(task.train), len(task.held_out)) == (60, 30)
    assert len(keys(task.train) | keys(task.held_out)) == 90
    assert build_task(config.model_copy(update={"train_size": 10})).held_out == task.held_out


def test_reasoning_gym_checks_with_its_own_rule() -> None:
    task = build_task(ReasoningGymTask(name="chain_sum", train_size=5, held_out_size=5))
    first, second = task.train[:2]
    assert first.answer != second.answer
    assert task.reward(first, f"I think <answer>{first.answer}</answer>") == 1.0
    assert task.reward(first, f"I think <answer>{second.answer}</answer>") < 0.5
    assert task.reward(first, first.answer) == 0.0
    assert not task.is_well_formed(first, first.answer)
    assert task.is_well_formed(first, "<answer>?</answer>")


def test_few_prompts_of_reasoning_gym_are_never_shared() -> None:
    """One-digit sums of two terms: 90 or so prompts, so most draws repeat an earlier one."""
    parameters = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    config = ReasoningGymTask(name="chain_sum", train_size=40, held_out_size=20, parameters=parameters)
    task = build_task(config)
    assert len(keys(task.train) | keys(task.held_out)) == 60
    with pytest.raises(ValueError, match=r"5000 problems asked for, \d+ different ones found in 50000 draws"):
        build_task(config.model_copy(update={"train_size": 5000}))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"name": "no_such_generator"}, "'no_such_generator' not registered"),
        ({"name": "chain_sum", "parameters": {"no_such": 1}}, "no_such"),
        ({"name": "chain_sum", "parameters": {"min_terms": -1}}, "min_terms"),
    ],
)
def test_a_wrong_generator_is_named(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(ReasoningGymTask(train_size=2, held_out_size=2, **settings_))


@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_any_text_gets_a_reward_from_reasoning_gym(text: str) -> None:
    task = build_task(ReasoningGymTask(name="countdown", train_size=2, held_out_size=2))
    assert 0.0 <= task.reward(task.train[0], f"<answer>{text}</answer>") <= 1.0
