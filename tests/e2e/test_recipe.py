"""A recipe as a process, against a real teacher server: killed in its middle stage, it ends as if it never had been."""

import asyncio
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from protos.client import connect
from student_trainer.config.recipe import load_plan
from student_trainer.loop import train
from student_trainer.recipe import StageFailed, run_plan
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import build_toy_model
from tests.server_process import ANY_PORTS, ServerProcess

pytestmark = pytest.mark.slow

TOKEN = "may-change-weights"

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
model = {{ path = "{folder}/model" }}
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


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("recipe") / "model", hidden_size=32, num_layers=1)


def write_recipe(model: Path, url: str) -> Path:
    path = model.parent / "recipe.toml"
    path.write_text(RECIPE.format(folder=model.parent, url=url))
    return path


def kill_after(recipe: Path, metrics: Path, step: int) -> None:
    command = [sys.executable, "-m", "student_trainer", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (metrics.exists() and any(row["step"] >= step for row in read_rows(metrics))):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


async def served_version(url: str) -> int:
    async with connect(url) as teacher:
        return (await teacher.info()).weights_version


def test_a_killed_recipe_goes_on_where_it_was_and_reloads_its_teacher(tmp_path, model, monkeypatch):
    monkeypatch.setenv("TEACHER_TOKEN", TOKEN)
    tokens = tmp_path / "tokens.toml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens.write_text(f'[trainer]\nsha256 = "{digest}"\nscopes = ["score", "admin"]\n')
    with ServerProcess(model, tmp_path, "--engine", "transformers", "--tokens", str(tokens), *ANY_PORTS) as server:
        recipe = write_recipe(model, server.ready["grpc_url"])
        first, second, third = (stage.config for stage in load_plan(recipe))
        kill_after(recipe, Path(second.run) / "metrics.jsonl", 3)
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
        assert asyncio.run(served_version(server.ready["grpc_url"])) == 1
    unbroken = train(second.model_copy(update={"run": str(tmp_path / "unbroken")}), quiet=True)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (ends[1], unbroken))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_a_stage_that_fails_is_named(tmp_path, model):
    recipe = tmp_path / "recipe.toml"
    text = RECIPE.format(folder=model.parent, url="grpc://127.0.0.1:9")
    recipe.write_text(text.replace(f"{model.parent}/runs", f"{tmp_path}/runs"))
    with pytest.raises(StageFailed, match=r"^stage third: .*127\.0\.0\.1:9"):
        list(run_plan(load_plan(recipe, ["stages.second.steps=1"]), quiet=True))
