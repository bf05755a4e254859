"""SFT on what a teacher wrote: asked for once, judged by the task, gone on with after a kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.client import connect
from protos.errors import NotReady
from protos.records import Chat, GenerateItem, Message, UserSuffix
from student_trainer.config import ConfigError, TrainConfig, parse_config
from student_trainer.loop import train
from student_trainer.run_folder import read_rows
from student_trainer.seeds import TRACES, derive_seed
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import JsonlTask, Problem, SplitTask, build_task
from student_trainer.traces import KEPT_FILE, REJECTED_FILE, teacher_traces
from tests.harness import LoopThread, served

PROBLEMS = [Problem(f"p{n}", (Message("user", f"{n}+{n + 1}"),), str(2 * n + 1)) for n in range(40)]
FIRST_IS_DIGIT = SplitTask(
    "digit", PROBLEMS[:20], PROBLEMS[36:], lambda _, text: float(text[:1].isdigit()), lambda *_: True
)
"""A reward that an untrained model gets about every other time."""

NEVER = SplitTask("never", PROBLEMS[:4], PROBLEMS[36:], lambda *_: 0.0, lambda *_: True)
SAMPLES = 2
BUDGET = 12
GONE = "grpc://127.0.0.1:1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def teacher(run: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = build_toy_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, num_layers=1, seed=1)
    with served(run, model) as url:
        yield url


def config_of(folder: Path, model: Path, url: str | None, **traces: Any) -> TrainConfig:
    return parse_config(
        {
            "run": str(folder),
            "steps": 3,
            "problems_per_step": 4,
            "seed": 3,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 30, "held_out_size": 10},
            "stage": {"kind": "sft", "traces": {"samples_per_problem": SAMPLES, "temperature": 0.9, **traces}},
            "rollout": {"max_new_tokens": BUDGET},
            "eval": {"num_problems": 4},
        }
        | ({"teacher": {"url": url, "max_wait_s": 0.0}} if url else {})
    )


def traces_of(config: TrainConfig, task: SplitTask = FIRST_IS_DIGIT) -> list[Problem]:
    Path(config.run).mkdir(exist_ok=True)
    assert config.stage.kind == "sft"
    assert config.stage.traces is not None
    return teacher_traces(config, config.stage.traces, task, quiet=True)


def files(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kept, rejected = (read_rows(folder / name) for name in (KEPT_FILE, REJECTED_FILE))
    return kept, rejected


async def asked(url: str, items: list[GenerateItem]) -> list[list[str]]:
    async with connect(url) as teacher:
        return [[sample.text for sample in result.samples] for result in await teacher.generate(items)]


def test_what_the_teacher_writes_is_judged_written_down_and_learnt(tmp_path: Path, model: Path, teacher: str) -> None:
    problems = traces_of(
        config_of(tmp_path / "run", model, teacher, privileged={"kind": "user_suffix", "text": "{answer}"})
    )
    kept, rejected = files(tmp_path / "run")
    assert len(kept) + len(rejected) == 20 * SAMPLES
    assert kept
    assert rejected
    assert all(row["reward"] == 1.0 and row["is_finished"] and row["reference"][0].isdigit() for row in kept)
    assert all(row["reward"] == 0.0 or not row["is_finished"] for row in rejected)
    assert [p.reference for p in problems] == [row["reference"] for row in kept]
    assert [p.id for p in problems] == [f"{row['problem']}/{row['sample']}" for row in kept]
    # They are the teacher's own, told the answer, by seeds that depend on the problem's place alone.
    items = [
        GenerateItem(
            Chat(problem.messages),
            max_new_tokens=BUDGET,
            temperature=0.9,
            num_samples=SAMPLES,
            seed=derive_seed(3, TRACES, place),
            privileged=UserSuffix(problem.answer),
        )
        for place, problem in enumerate(FIRST_IS_DIGIT.train)
    ]
    texts = asyncio.run(asked(teacher, items))
    for row in (*kept, *rejected):
        assert row["reference"] == texts[int(row["problem"][1:])][row["sample"]]
    # Any other run can take the file as its task.
    again = build_task(JsonlTask(path=tmp_path / "run" / KEPT_FILE, held_out_fraction=0.3, reward="number"))
    assert {p.reference for p in (*again.train, *again.held_out)} <= {p.reference for p in problems}


def test_a_killed_writer_goes_on_where_it_was_and_asks_nobody_when_all_is_there(
    tmp_path: Path, model: Path, teacher: str
) -> None:
    config = config_of(tmp_path / "run", model, teacher)
    unbroken = traces_of(config)
    whole = {name: (tmp_path / "run" / name).read_text() for name in (KEPT_FILE, REJECTED_FILE)}
    for name, text in whole.items():
        lines = text.splitlines(keepends=True)
        # Killed with one line in the middle of a problem, and half of the next on disk.
        (tmp_path / "run" / name).write_text("".join(lines[:3]) + lines[3][:20])
    with pytest.raises(NotReady):
        traces_of(config_of(tmp_path / "run", model, GONE))
    resumed = traces_of(config)
    assert sorted(p.id for p in resumed) == sorted(p.id for p in unbroken)
    for name, text in whole.items():
        assert sorted((tmp_path / "run" / name).read_text().splitlines()) == sorted(text.splitlines())
    assert traces_of(config_of(tmp_path / "run", model, GONE)) == resumed


def test_another_teacher_does_not_go_on_with_its_traces(tmp_path: Path, model: Path, teacher: str) -> None:
    config = config_of(tmp_path / "run", model, teacher)
    traces_of(config)
    noted = tmp_path / "run" / "teacher.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"model": "another"}))
    (tmp_path / "run" / KEPT_FILE).unlink()
    with pytest.raises(ValueError, match="the teacher is not the one that this run began with: model was 'another'"):
        traces_of(config)


def test_a_run_says_how_many_were_kept_and_learns_them(
    tmp_path: Path, model: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every trace that ended is kept, of which the run's batches are made: their tokens and one EOS each."""
    train(config_of(tmp_path / "run", model, teacher, min_reward=0.0, num_problems=20))
    kept, rejected = files(tmp_path / "run")
    assert len(kept) + len(rejected) == 20 * SAMPLES
    assert not any(row["is_finished"] for row in rejected)
    said = capsys.readouterr().err
    assert f"traces: {len(kept)} kept of {20 * SAMPLES} that the teacher wrote" in said
    assert f"trace {20 * SAMPLES}/{20 * SAMPLES}  kept {len(kept)}  0 s left" in said
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    # Four of them a step and, in the toy world, a token a character.
    lengths = sorted(len(row["reference"]) + 1 for row in kept)
    assert all(sum(lengths[:4]) <= row["num_tokens"] <= sum(lengths[-4:]) for row in rows[1:])


def test_a_teacher_that_writes_nothing_right_is_one_sentence(tmp_path: Path, model: Path, teacher: str) -> None:
    sentence = r"none of the 8 traces that the teacher wrote has ended with a reward of 1 \(stage\.traces\.min_reward\)"
    with pytest.raises(ValueError, match=sentence):
        traces_of(config_of(tmp_path / "run", model, teacher), NEVER)


def test_traces_need_a_teacher() -> None:
    with pytest.raises(ConfigError, match=r"stage\.traces needs a teacher: set teacher\.url or pass --teacher URL"):
        config_of(Path("r"), Path("m"), None)
