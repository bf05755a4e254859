"""`student-trainer probe prefix` on a multiple-choice set through `datasets`, with the columns of GPQA-Diamond."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from student_trainer.cli import app
from student_trainer.tasks import DatasetTask, build_task
from tests.harness import LoopThread, served
from tests.tiny_model import IM_END, VOCAB_SIZE, build_tiny_qwen3

NUM_QUESTIONS = 40
SURE = 60.0
"""A logit that nothing else comes near."""

TASK = """
[task]
kind = "dataset"
name = "json"
data_files = {{ train = "{file}" }}
prompt_column = "Question"
answer_column = "Correct Answer"
wrong_columns = ["Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
reward = "multiple_choice"

[rollout]
max_new_tokens = 8

[eval]
num_problems = {num}
"""


def build_writer(folder: Path, *texts: str) -> Path:
    """A model that answers every prompt with the first text, and goes on from the beginning of any other as it ends.

    Its next token follows from the last one alone: the embedding is one-hot, the layer adds nothing, and the norm
    multiplies by the root of the width.
    """
    width = 320  # above VOCAB_SIZE, and heads of 32
    path = build_tiny_qwen3(folder, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, hidden_size=width))
    begin = tokenizer.encode("\n")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :VOCAB_SIZE] = torch.eye(VOCAB_SIZE)
        for text in reversed(texts):
            ids = [*begin, *tokenizer.encode(text), tokenizer.convert_tokens_to_ids(IM_END)]
            for last, following in pairwise(ids):
                model.lm_head.weight[:, last] = 0.0
                model.lm_head.weight[following, last] = SURE / width**0.5
    made = folder / "model"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def test_a_teacher_that_always_says_a_is_right_where_a_is_and_says_c_after_a_students_c(
    tmp_path: Path, run: LoopThread
) -> None:
    """ "(A)" and its end are four tokens: at .3 the prefix is "(", after which the teacher says A; at .6 it is "(A" of
    its own and "(C" of the student's.
    """
    rows = [
        {
            "Question": f"What is {n} + 1?",
            "Correct Answer": f"{n + 1}\n",
            **{f"Incorrect Answer {i}": f"{n}.{i}\n" for i in (1, 2, 3)},
            "Subdomain": "Arithmetic",
        }
        for n in range(NUM_QUESTIONS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "task.toml"
    config.write_text(TASK.format(file=tmp_path / "rows.jsonl", num=NUM_QUESTIONS))
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
    teacher = build_writer(tmp_path / "teacher", "(A)", "(C)")
    student = build_writer(tmp_path / "student", "(C)", "(A)")
    out = tmp_path / "out"
    asked = ["probe", "prefix", str(config), "--out", str(out), "--problems", "all", "--cut", "0.3", "--cut", "0.6"]
    with served(run, teacher) as url:
        arguments = [*asked, "--student", str(student), "--teacher", url]
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
    found = json.loads((out / "result.json").read_text())

    task = build_task(DatasetTask.model_validate(tomllib.loads(config.read_text())["task"]))
    problems = [*task.train, *task.held_out]
    # The question, an empty line and four choices, whose own line breaks are gone.
    assert {len(problem.messages[0].content.splitlines()) for problem in problems} == {6}
    letters = Counter(problem.answer for problem in problems)
    share = {letter: letters[letter] / NUM_QUESTIONS for letter in "AC"}
    assert share["A"] != share["C"]
    assert (found["num_problems"], found["alone"]["well_formed"]) == (NUM_QUESTIONS, 1)
    assert (found["alone"]["accuracy"], found["student_alone"]["accuracy"]) == (share["A"], share["C"])
    early, late = found["cuts"]
    assert (early["own"]["accuracy"], early["student"]["accuracy"]) == (share["A"], share["A"])
    assert (late["own"]["accuracy"], late["student"]["accuracy"]) == (share["A"], share["C"])
    assert late["paired"]["right_to_wrong"] == letters["A"]
    assert late["paired"]["wrong_to_right"] == letters["C"]
    assert late["with_error"]["student"]["accuracy"] == 0
    assert late["without_error"]["student"]["num_answers"] == letters["C"]
