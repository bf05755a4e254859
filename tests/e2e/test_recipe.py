"""A recipe as a process, against a real teacher server: killed in its middle stage, it ends as if it never had been."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from protos.client import connect
from protos.records import ScoreItem
from student_trainer.config.recipe import load_plan
from student_trainer.loop import train
from student_trainer.recipe import StageFailed, run_plan
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import VOCABULARY, build_toy_model
from tests.harness import LoopThread
from tests.reference import sampled_logprobs
from tests.taking_weights import SECRET, taking_weights
from tests.warm import kill_after_step, start_command

pytestmark = pytest.mark.slow

END = {"system": "\n", "user": ":"}
"""What the toy's chat template puts after each message."""

RECIPE = """
run = "{folder}/runs"
problems_per_step = 4
[task]
kind = "toy"
train_size = 60
held_out_size = 10
[rollout]
max_new_tokens = 8
[optim]
lr = 1e-2
warmup_steps = 0
[eval]
num_problems = 10
[checkpoint]
every_steps = 2
[[stages]]
name = "first"
steps = 2
model = {{ path = "{model}" }}
stage = {{ kind = "sft" }}
[[stages]]
name = "second"
steps = 9
model = {{ from = "first" }}
stage = {{ kind = "sft" }}
[[stages]]
name = "third"
steps = 2
model = {{ from = "second" }}
teacher = {{ url = "{url}", from = "second" }}
stage = {{ kind = "opd" }}
"""

RLVR = """
run = "{folder}/runs"
problems_per_step = 4
[task]
kind = "toy"
min_terms = 2
max_terms = 2
max_operand = 4
train_size = 10
held_out_size = 2
rules = ["terse"]
rule_rate = 1.0
[rollout]
max_new_tokens = 4
[optim]
lr = 1e-2
warmup_steps = 0
[eval]
num_problems = 2
[checkpoint]
every_steps = 2
[[stages]]
name = "sft"
steps = 20
model = {{ path = "{model}" }}
stage = {{ kind = "sft" }}
[[stages]]
name = "rlvr"
steps = 5
model = {{ from = "sft" }}
stage = {{ kind = "grpo" }}
rollout = {{ url = "{url}", samples_per_problem = 4 }}
[[stages]]
name = "opd"
steps = 2
model = {{ from = "sft" }}
teacher = {{ url = "{url}", from = "rlvr" }}
stage = {{ kind = "opd" }}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("recipe") / "model", hidden_size=32, num_layers=1)


def write_recipe(recipe: str, model: Path, folder: Path, url: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(recipe.format(model=model, folder=folder, url=url))
    return path


@contextmanager
def serving(run: LoopThread, model: Path, folder: Path) -> Iterator[str]:
    """The URL of a server whose weights the holder of SECRET may change."""
    with run.entered(taking_weights(model, folder)) as server:
        yield server.url("grpc")


async def score(url: str, prompt: list[int], completion: list[int]) -> np.ndarray:
    async with connect(url) as teacher:
        [result] = await teacher.score([ScoreItem(np.array(prompt, np.int32), np.array(completion, np.int32))])
    return result.sampled_logprobs


async def served_version(url: str) -> int:
    async with connect(url) as teacher:
        return (await teacher.info()).weights_version


def test_a_killed_recipe_goes_on_where_it_was_and_reloads_its_teacher(run: LoopThread, tmp_path, model, monkeypatch):
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)
    with serving(run, model, tmp_path) as url:
        recipe = write_recipe(RECIPE, model, tmp_path, url)
        first, second, third = (stage.config for stage in load_plan(recipe))
        kill_after_step(start_command(recipe), Path(second.run), 3)
        Path(third.run).mkdir()
        (Path(third.run) / "teacher.json").write_text('{"weights_version": 5}')
        before = (Path(first.run) / "metrics.jsonl").stat()
        ends = [last for _, last in run_plan(load_plan(recipe), quiet=True)]
        assert [end.name for end in ends] == ["step-00000002", "step-00000009", "step-00000002"]
        # A finished stage is not touched again.
        assert (Path(first.run) / "metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
        # The student begins as "second" left it, and its teacher is now the same: nothing to learn at the first step.
        noted = Path(third.run) / "teacher.json"
        assert not noted.exists() or '"weights_version": 5' not in noted.read_text()
        rows = read_rows(Path(third.run) / "metrics.jsonl")
        assert abs(rows[1]["reverse_kl"]) < 1e-5
        assert ends == [last for _, last in run_plan(load_plan(recipe), quiet=True)]
        assert asyncio.run(served_version(url)) == 1
    unbroken = train(second.model_copy(update={"run": str(tmp_path / "unbroken")}), quiet=True)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (ends[1], unbroken))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_a_reinforced_teacher_teaches(run: LoopThread, tmp_path, model, monkeypatch):
    """SFT, GRPO of the teacher, OPD by it: the server writes for the second run and scores for the third.

    Killed in the second, which goes on to the weights of an unbroken one.
    """
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)
    with serving(run, model, tmp_path) as url:
        recipe = write_recipe(RLVR, model, tmp_path, url)
        _, rlvr, opd = load_plan(recipe)
        kill_after_step(start_command(recipe), Path(rlvr.config.run), 3)
        base, reinforced, _ = (last for _, last in run_plan(load_plan(recipe), quiet=True))
        before, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, reinforced))
        rows = [row for row in read_rows(Path(opd.config.run) / "rollouts.jsonl") if row["step"] == 1]
        assert len(rows) == 4
        for row in rows:
            prompt = [1, *map(VOCABULARY.index, "".join(m["content"] + END[m["role"]] for m in row["prompt"]))]
            ids = [VOCABULARY.index(token) for token in row["tokens"]]
            student_T, teacher_T, served_T = (
                sampled_logprobs(before, prompt, ids),
                sampled_logprobs(teacher, prompt, ids),
                asyncio.run(score(url, prompt, ids)),
            )
            # What the run was taught by, to the log's four decimals; and what the server serves now.
            np.testing.assert_allclose(row["teacher_advantage"], teacher_T - student_T, atol=1e-4)
            np.testing.assert_allclose(served_T, teacher_T, atol=1e-5)
            # The reinforcement was no empty one, so that no other weights would have passed.
            assert np.abs(teacher_T - student_T).max() > 1e-2
        unbroken = train(rlvr.config.model_copy(update={"run": str(tmp_path / "unbroken")}), quiet=True)
    expected = load_file(unbroken / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(reinforced / "model.safetensors").items())


def test_a_stage_that_fails_is_named(tmp_path, model):
    recipe = write_recipe(RECIPE, model, tmp_path, "grpc://127.0.0.1:9")
    with pytest.raises(StageFailed, match=r"^stage third: .*127\.0\.0\.1:9"):
        list(run_plan(load_plan(recipe, ["stages.second.steps=1"]), quiet=True))
