"""Two processes under torchrun (gloo, FSDP2) take the steps of one, and either goes on from the other's checkpoint.

The teacher is the transformers engine: its numbers do not depend on what is scored beside an item.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer import checkpoint
from student_trainer.config import ConfigError, load_config, parse_config
from student_trainer.config.recipe import load_plan
from student_trainer.loop import train
from student_trainer.manifest import damage
from student_trainer.recipe import run_plan
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import build_toy_model, toy_tokenizer
from teacher_server.engines.transformers import TransformersEngine
from tests.harness import LoopThread, core_over, start_server
from tests.taking_weights import SECRET, taking_weights
from tests.toy_run import toy_run, write_toy_run

pytestmark = pytest.mark.slow

TOLD = {"kind": "opsd", "privileged": {"kind": "user_suffix", "text": "{answer}"}}
STEPS = 6
HALF = 3
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("student"), hidden_size=32, num_layers=2)


@pytest.fixture(scope="module")
def untied(model: Path, tmp_path_factory) -> Path:
    """A model whose LM head has a weight of its own, which ranks with fewer micro-batches must reduce with the rest."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student_url(run: LoopThread, untied: Path, tmp_path_factory):
    """Of a server of the student's model, which takes weights."""
    context = taking_weights(untied, tmp_path_factory.mktemp("spool"))
    server = run(context.__aenter__())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_TOKEN", SECRET)
        yield server.url("grpc")
    run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def teacher_url(run: LoopThread, tmp_path_factory):
    model = build_toy_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, num_layers=1, seed=1)

    async def start():
        return await start_server(core_over(TransformersEngine(str(model)), model))

    server = run(start())
    yield server.url("grpc")
    run(server.stop())


TABLES = {
    "steps": STEPS,
    "problems_per_step": 7,
    "seed": 5,
    "task": {"kind": "toy", "train_size": 200, "held_out_size": 20},
    "rollout": {"max_new_tokens": 8},
    "optim": {"lr": 1e-2, "micro_batch_size": 3, "warmup_steps": 2},
    "eval": {"num_problems": 9, "every_steps": HALF, "batch_size": 3},
    "checkpoint": {"every_steps": HALF, "keep": 5},
}
"""Seven problems over two ranks are shares of 3 and 4, and at three a micro-batch one rank has one more."""

RECIPE = {
    "warm": {"steps": 20, "stage": {"kind": "sft"}},
    "grpo": {"stage": {"kind": "grpo", "num_minibatches": 2, "kl_coefficient": 0.05, "truncated": "punish"}},
    "ppo": {"stage": {"kind": "ppo", "num_minibatches": 3, "num_epochs": 2, "kl_coefficient": 0.05, "critic_lr": 1e-3}},
    "frozen": {"stage": TOLD, "teacher": {"from": "warm"}},
    "live": {"stage": TOLD | {"teacher": "live"}},
    "ema": {"stage": TOLD | {"teacher": "ema", "ema_decay": 0.5}},
    "remote": {"stage": {"kind": "opd"}},
}
"""Of stages that learn from what the first one leaves, for an untrained model's rewards are all 0."""

SMALL_SUMS = {
    "kind": "toy",
    "min_terms": 2,
    "max_terms": 2,
    "max_operand": 4,
    "train_size": 10,
    "held_out_size": 2,
    "rules": ["terse"],
    "rule_rate": 1.0,
}
"""Some of which the first stage learns to answer."""


def write_recipe(folder: Path, model: Path, teacher_url: str, student_url: str) -> Path:
    """All stages of RECIPE; the server of `student_url` takes weights."""
    stages = {name: {"name": name, "model": {"from": "warm"}} | own for name, own in RECIPE.items()}
    stages["warm"]["model"] = {"path": str(model)}
    for name in ("grpo", "ppo", "remote"):
        stages[name]["rollout"] = {"samples_per_problem": 3}
    for name in ("frozen", "live", "ema"):
        stages[name]["teacher"] = stages[name].get("teacher", {}) | {"url": student_url}
    stages["remote"] |= {"teacher": {"url": teacher_url}}
    stages["remote"]["rollout"] |= {"url": student_url, "max_staleness": 1}
    tables = TABLES | {"run": str(folder), "task": SMALL_SUMS, "eval": {"num_problems": 2}}
    folder.mkdir()
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tables | {"stages": list(stages.values())}))
    return path


def write_config(folder: Path, model: Path, stage: str, **changes) -> Path:
    return write_toy_run(folder, model, **TABLES | {"stage": {"kind": stage}} | changes)


def continued(path: Path, other: Path) -> Path:
    """The config of a run whose folder holds `other`'s first HALF steps and its checkpoint after them."""
    source, target = Path(load_config(other).run), Path(load_config(path).run)
    name = f"step-{HALF:08d}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[: HALF + 1]))
    return path


def under_torchrun(*configs: Path) -> None:
    script = Path(__file__).with_name("ranks.py")
    result = subprocess.run([*TORCHRUN, script, *configs], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def curve(config: Path, name: str = "loss") -> list[float]:
    rows = read_rows(Path(load_config(config).run) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    return [row[name] for row in rows[1:]]


def saved(config: Path) -> dict:
    return load_file(checkpoint.found(Path(load_config(config).run) / "checkpoints")[-1] / "model.safetensors")


def test_two_processes_take_the_steps_of_one(tmp_path, model, teacher_url):
    teacher = {"teacher": {"url": teacher_url}}
    adapted = {"model": {"path": str(model), "lora": {"rank": 4}, "gradient_checkpointing": True}}
    one, two = (
        {
            "sft": write_config(tmp_path / f"sft-{ranks}", model, "sft"),
            "opd": write_config(tmp_path / f"opd-{ranks}", model, "opd", **teacher),
            "lora": write_config(tmp_path / f"lora-{ranks}", model, "sft", **adapted),
        }
        for ranks in (1, 2)
    )
    one_then_two = write_config(tmp_path / "sft-1-2", model, "sft")
    two_then_one = write_config(tmp_path / "opd-2-1", model, "opd", **teacher)
    bf16 = write_config(tmp_path / "bf16-2", model, "sft", model={"path": str(model), "dtype": "bfloat16"})
    for config in one.values():
        train(load_config(config), quiet=True)
    under_torchrun(*two.values(), continued(one_then_two, one["sft"]), bf16)
    train(load_config(continued(two_then_one, two["opd"])), quiet=True)

    for name in ("sft", "opd", "lora"):
        assert curve(two[name]) == pytest.approx(curve(one[name]), abs=1e-4)
        assert curve(two[name], "grad_norm") == pytest.approx(curve(one[name], "grad_norm"), abs=1e-3)
        assert abs(curve(one[name])[0] - curve(one[name])[-1]) > 30e-4  # the runs went 30 tolerances far
        assert saved(two[name]).keys() == saved(one[name]).keys()
    assert curve(one_then_two) == pytest.approx(curve(one["sft"]), abs=1e-4)
    assert curve(two_then_one) == pytest.approx(curve(one["opd"]), abs=1e-4)
    for name in ("length_mean", "truncation_rate", "reward", "reverse_kl", "num_tokens"):
        assert curve(two["opd"], name) == pytest.approx(curve(one["opd"], name), abs=1e-4)
    # bfloat16 has 8 bits: its curve is the float32 one's within its rounding, and what it saves is bfloat16.
    assert curve(bf16) == pytest.approx(curve(one["sft"]), abs=0.1)
    assert {str(tensor.dtype) for tensor in saved(bf16).values()} == {"torch.bfloat16"}


def test_two_processes_run_a_recipe_of_every_stage_as_one_does(tmp_path, untied, teacher_url, student_url):
    one, two = (write_recipe(tmp_path / f"ranks-{n}", untied, teacher_url, student_url) for n in (1, 2))
    for _ in run_plan(load_plan(one), quiet=True):
        pass
    under_torchrun(two)
    for alone, shared in zip(load_plan(one), load_plan(two), strict=True):
        print(alone.name)
        for name in read_rows(Path(alone.config.run) / "metrics.jsonl")[-1]:
            a, b = (([row.get(name) for row in read_rows(Path(s.config.run) / "metrics.jsonl")]) for s in (alone, shared))
            diff = max(abs((x or 0) - (y or 0)) for x, y in zip(a, b))
            print("  ", name, diff, a[:7] if name in ("loss", "grad_norm", "reward", "groups_dropped", "draws","num_updates") else "")


def test_a_rank_that_is_killed_ends_the_run_and_its_checkpoints_are_whole(tmp_path, model):
    config = write_config(tmp_path / "killed", model, "sft", steps=100_000, checkpoint={"every_steps": 5})
    run = tmp_path / "killed" / "run"
    command = [*TORCHRUN, "-m", "student_trainer", "train", str(config)]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not checkpoint.found(run / "checkpoints"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        children[1].kill()
        assert process.wait(timeout=60) != 0
    assert not any(child.is_running() for child in children)
    assert all(damage(path) == "" for path in checkpoint.found(run / "checkpoints"))


def test_fewer_problems_than_processes_are_refused(tmp_path, model):
    config = parse_config(toy_run(tmp_path, model, **TABLES))
    config.check_ranks(7)
    with pytest.raises(ConfigError, match="problems_per_step is 7, fewer than the 8 processes: raise it, or start"):
        config.check_ranks(8)
