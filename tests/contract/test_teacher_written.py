"""Distillation on texts that the teacher wrote, by a real server: what is learnt, what is watched, what is refused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from protos.client import connect
from protos.records import GenerateItem
from student_trainer import checkpoint
from student_trainer.collate import completion_logits
from student_trainer.config import ConfigError, ModelConfig, TrainConfig, parse_config
from student_trainer.doubts import Doubts
from student_trainer.learner import Learner
from student_trainer.loop import train
from student_trainer.losses import forward_kl, log_probs
from student_trainer.run_folder import read_rows
from student_trainer.seeds import pick, rollout_seeds
from student_trainer.stages import build_stage
from student_trainer.stages.opd import is_by_teacher
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import build_task
from student_trainer.text import render_prompt
from tests.harness import LoopThread, served

TEMPERATURE = 0.8
STEPS = 6
TIMES = {"rollout_s", "score_s", "step_s", "scored_tokens_per_s", "watch_s"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: build_toy_model(folder / name, hidden_size=32, num_layers=1, seed=i)
        for i, name in enumerate(("student", "teacher"))
    }


@pytest.fixture(scope="module")
def teacher(run: LoopThread, models: dict[str, Path]) -> Iterator[str]:
    with served(run, models["teacher"]) as url:
        yield url


def config_of(folder: Path, student: Path, url: str, stage: dict[str, Any], **tables: Any) -> TrainConfig:
    return parse_config(
        {
            "run": str(folder),
            "steps": STEPS,
            "problems_per_step": 6,
            "model": {"path": str(student)},
            "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
            "teacher": {"url": url},
            "stage": {"kind": "opd", **stage},
            "rollout": {"max_new_tokens": 8, "temperature": TEMPERATURE, "samples_per_problem": 2},
            "optim": {"lr": 1e-2, "warmup_steps": 0, "micro_batch_size": 5},
            "eval": {"num_problems": 4},
            "checkpoint": {"every_steps": 3, "keep": 10},
        }
        | tables
    )


async def texts_of(url: str, items: list[GenerateItem]) -> list[list[int]]:
    async with connect(url) as teacher:
        results = await teacher.generate(items)
    return [sample.token_ids.tolist() for result in results for sample in result.samples]


def test_a_step_that_the_teacher_writes_is_the_teachers_text_under_the_students_loss(
    tmp_path: Path, models: dict[str, Path], teacher: str
) -> None:
    """Against two plain models: the texts by their seeds, KL(q || p) over the whole vocabulary, the student's top K."""
    stage = {"teacher_written": 1.0, "loss": {"kind": "forward_kl", "top_k": 5}}
    config = config_of(tmp_path, models["student"], teacher, stage)
    student, task = load_student(config.model), build_task(config.task)
    built = build_stage(config, student, task)
    try:
        collected = built.collect(2)
        batch = collected.batch
        problems = pick(task.train, 6, 2, config.seed)
        items = [
            GenerateItem(
                render_prompt(student.tokenizer, problem.messages),
                max_new_tokens=8,
                temperature=TEMPERATURE,
                num_samples=2,
                seed=seed,
            )
            for problem, seed in zip(problems, rollout_seeds(config.seed, 2, 6), strict=True)
        ]
        written = [ids[mask].tolist() for ids, mask in zip(batch.completion_ids_BT, batch.mask_BT, strict=True)]
        assert written == asyncio.run(texts_of(teacher, items))
        # The student wrote nothing: no rollouts to watch or to show, no log-probs of its own sampling.
        assert not collected.rollouts
        assert batch.sampled_logp_BT is None
        assert collected.metrics["teacher_written"] == 1.0
        with torch.no_grad():
            teacher_model = load_student(ModelConfig(path=str(models["teacher"]))).model
            p, q = (log_probs(completion_logits(m.eval(), batch), TEMPERATURE) for m in (student.model, teacher_model))
        assert batch.student_top_BTK is not None
        top = p.gather(-1, batch.student_top_BTK.clamp_min(0))[batch.mask_BT]
        torch.testing.assert_close(top, p.topk(5).values[batch.mask_BT], rtol=0, atol=1e-5)
        row = Learner.build(student, config).step(built, collected)
        assert row["loss"] == pytest.approx(float(forward_kl(p, q)[batch.mask_BT].mean()), abs=1e-5)
        gap_BT = (q - p).gather(-1, batch.completion_ids_BT[..., None])[..., 0]
        assert row["teacher_written/forward_kl"] == pytest.approx(float(gap_BT[batch.mask_BT].mean()), abs=1e-5)
    finally:
        built.close()


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def test_a_mixed_run_keeps_the_writers_apart_and_resumes_bit_for_bit(
    tmp_path: Path, models: dict[str, Path], teacher: str
) -> None:
    config = config_of(tmp_path / "run", models["student"], teacher, {"teacher_written": 0.5, "loss": {"top_k": 5}})
    last = train(config, quiet=True)
    rows = rows_of(tmp_path / "run")
    drawn = [is_by_teacher(step, 0.5, config.seed) for step in range(STEPS)]
    assert [row["teacher_written"] for row in rows[1:]] == [float(by_teacher) for by_teacher in drawn]
    assert 0 < sum(drawn) < STEPS
    for row, by_teacher in zip(rows[1:], drawn, strict=True):
        of_student = {"reverse_kl", "support_gap", "reward", "length_mean"} & row.keys()
        assert len(of_student) == (0 if by_teacher else 4)
        assert ("teacher_written/forward_kl" in row) == ("teacher_written/support_gap" in row) == by_teacher
    assert {row["step"] - 1 for row in read_rows(tmp_path / "run" / "rollouts.jsonl")} == {
        step for step in range(STEPS) if not drawn[step]
    }
    resumed = config.model_copy(update={"run": str(tmp_path / "resumed")})
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    config_file = tmp_path / "resumed" / "config.toml"
    config_file.write_text(config_file.read_text().replace(config.run, resumed.run))
    checkpoint.remove(tmp_path / "resumed" / "checkpoints" / last.name)
    again = train(resumed, quiet=True)
    assert rows_of(tmp_path / "resumed") == rows
    ours, theirs = (load_file(path / "model.safetensors") for path in (again, last))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_a_rule_is_doubted_by_steps_of_the_writer_whose_tokens_it_watches(
    tmp_path: Path, models: dict[str, Path], teacher: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With this seed the teacher writes the first step and the student the second."""
    seed = 8
    assert [is_by_teacher(step, 0.5, seed) for step in range(2)] == [True, False]
    signals = ("reward", "teacher_written/forward_kl", "reverse_ql", "teacher_written/reward")
    config = config_of(
        tmp_path,
        models["student"],
        teacher,
        {"teacher_written": 0.5},
        steps=2,
        seed=seed,
        watch={"rules": [{"signal": signal, "above": 1e9} for signal in signals]},
    )
    train(config, quiet=True)
    said = [record.message for record in caplog.records if "never sounds" in record.message]
    assert [sentence.split("'")[1] for sentence in said] == ["teacher_written/reward", "reverse_ql"]
    assert said[1].endswith("did you mean 'reverse_kl'?")
    # Of a teacher that writes every step, and of one that writes none, the first row tells everything.
    for share, first in ((1.0, "reward"), (0.0, "teacher_written/forward_kl")):
        stage = config.stage.model_copy(update={"teacher_written": share})
        row = dict.fromkeys({*signals} - {first}, 0.0) | {"teacher_written": share}
        [sentence] = Doubts(config.model_copy(update={"stage": stage})).of(row)
        assert repr(first) in sentence


def test_the_share_of_steps_that_the_teacher_writes() -> None:
    drawn = {share: [is_by_teacher(step, share, 7) for step in range(1000)] for share in (0.0, 0.3, 0.6, 1.0)}
    assert not any(drawn[0.0])
    assert all(drawn[1.0])
    # Four standard deviations of a binomial share: 4 sqrt(.3 * .7 / 1000).
    assert abs(sum(drawn[0.3]) / 1000 - 0.3) < 0.058
    assert drawn[0.3] != [is_by_teacher(step, 0.3, 8) for step in range(1000)]
    # A larger share has the steps of a smaller one, and more.
    assert all(more for less, more in zip(drawn[0.3], drawn[0.6], strict=True) if less)


@pytest.mark.parametrize(
    ("stage", "tables", "sentence"),
    [
        (
            {"loss": {"kind": "policy_gradient"}},
            {},
            "teacher_written is 0.3, and loss.kind policy_gradient needs tokens",
        ),
        ({"loss": {"kind": "k2"}}, {}, "loss.kind k2 needs tokens that the student itself sampled"),
        (
            {"loss": {"kind": "k3", "importance": "clipped"}},
            {},
            "weighted by importance or not: set teacher_written to 0",
        ),
        (
            {},
            {"watch": {"rules": [{"signal": "s", "above": 1, "action": "roll_back", "loss": {"kind": "k2"}}]}},
            "loss.kind k2 needs tokens that the student itself sampled",
        ),
        ({"lambda": 0.5}, {}, "name the teacher's share instead, teacher_written = 1 - lambda"),
        ({"teacher_written": 1.5}, {}, "stage.opd.teacher_written: Input should be less than or equal to 1"),
    ],
)
def test_what_needs_the_students_own_samples_is_refused(
    stage: dict[str, Any], tables: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(Path("r"), Path("m"), "grpc://h:1", {"teacher_written": 0.3, **stage}, **tables)
    assert sentence in str(caught.value)
