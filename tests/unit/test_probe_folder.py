"""What a probe's folder keeps and refuses, its budget, and its settings."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from student_trainer.config import ConfigError
from student_trainer.probes.collection import BudgetSpent, Collection, Question
from student_trainer.probes.folder import ProbeFolder
from student_trainer.probes.settings import ProbeOptions, load_settings


def rows(items):
    return [{"num_tokens": item, "text": str(item)} for item in items]


def test_what_is_in_the_folder_is_not_asked_again(tmp_path):
    asked: list[int] = []

    def ask(items):
        asked.extend(items)
        return rows(items)

    questions = [Question(f"q/{i}", i, 10) for i in range(5)]
    first = Collection(ProbeFolder(tmp_path, {"a": 1}), batch_size=2).answers(questions[:3], ask)
    with (tmp_path / "raw.jsonl").open("a") as file:
        file.write('{"key": "q/3", "num_to')  # killed while it wrote
    folder = ProbeFolder(tmp_path, {"a": 1})
    again = Collection(folder, batch_size=2).answers(questions, ask)
    assert asked == [0, 1, 2, 3, 4]
    assert again[:3] == first
    assert folder.num_tokens == 0 + 1 + 2 + 3 + 4
    assert [json.loads(line)["key"] for line in (tmp_path / "raw.jsonl").read_text().splitlines()] == [
        q.key for q in questions
    ]


def test_another_probe_is_refused_with_what_differs(tmp_path):
    ProbeFolder(tmp_path, {"task": {"max_terms": 3}, "seed": 0})
    with pytest.raises(ConfigError, match=r"another task.max_terms \(task.max_terms was 3 and is 4\): choose another"):
        ProbeFolder(tmp_path, {"task": {"max_terms": 4}, "seed": 0})


def test_a_budget_is_never_passed_and_a_larger_one_goes_on(tmp_path):
    """Each question may take 10 tokens and takes 4: with 25, two fit at once (20), then one (8 + 10), then one (12 + 10
    would be 22), then one (16 + 10 = 26) does not.
    """
    folder = ProbeFolder(tmp_path, {})
    questions = [Question(str(i), 4, 10) for i in range(6)]
    with pytest.raises(BudgetSpent):
        Collection(folder, batch_size=4, max_tokens=25).answers(questions, rows)
    assert (len(folder.rows), folder.num_tokens) == (4, 16)
    assert len(Collection(folder, batch_size=4, max_tokens=100).answers(questions, rows)) == 6


def test_what_is_no_number_is_null_in_the_result(tmp_path):
    ProbeFolder(tmp_path, {}).write({"a": [math.nan, 1.0], "b": {"c": math.inf}}, b"png")
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}


def test_settings_of_a_task_alone_and_of_a_url(tmp_path):
    (tmp_path / "task.toml").write_text('[task]\nkind = "toy"\n[model]\npath = "here"\n')
    options = ProbeOptions(out=tmp_path, teacher=("grpc://a:1", "grpc://b:2"), student="grpc://c:3")
    settings = load_settings(tmp_path / "task.toml", ["eval.num_problems=7"], options)
    assert [teacher.url for teacher in settings.teachers] == ["grpc://a:1", "grpc://b:2"]
    assert settings.config.model.path == "here"
    assert settings.options.student_url == "grpc://c:3"
    assert settings.config.eval.num_problems == 7
    with pytest.raises(ConfigError, match="--teacher was given 2 times"):
        _ = settings.teacher
    by_path = replace(options, student="elsewhere", teacher=())
    with pytest.raises(ConfigError, match="needs a teacher"):
        load_settings(tmp_path / "task.toml", [], by_path)
    with pytest.raises(ValueError, match="--max-tokens-total is 0; it must be at least 1"):
        ProbeOptions(out=tmp_path, max_tokens_total=0)
