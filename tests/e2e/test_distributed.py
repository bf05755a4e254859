"""Two processes under torchrun (gloo, FSDP2) take the steps of one, and either goes on from the other's checkpoint.

The teacher is the transformers engine: its numbers do not depend on what is scored beside an item.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from student_trainer import checkpoint
from student_trainer.config import dump_config, load_config, parse_config
from student_trainer.loop import train
from student_trainer.run_folder import read_rows
from student_trainer.study.teacher_process import teacher_process
from student_trainer.study.toy import build_toy_model

pytestmark = pytest.mark.slow

STEPS = 6
HALF = 3
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("student"), hidden_size=32, num_layers=2)


@pytest.fixture(scope="module")
def teacher_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = build_toy_model(folder / "model", hidden_size=32, num_layers=1, seed=1)
    with teacher_process(model, folder, engine="transformers") as process:
        yield process.wait()["grpc_url"]


def write_config(folder: Path, model: Path, stage: str, *, model_keys: dict | None = None, **tables) -> Path:
    """Seven problems over two ranks are shares of 3 and 4, and with two a micro-batch 2 and 2 of unequal length."""
    config = parse_config(
        {
            "run": str(folder / "run"),
            "steps": STEPS,
            "problems_per_step": 7,
            "seed": 5,
            "model": {"path": str(model), **(model_keys or {})},
            "task": {"kind": "toy", "train_size": 200, "held_out_size": 20},
            "stage": {"kind": stage},
            "rollout": {"max_new_tokens": 8},
            "optim": {"lr": 1e-2, "micro_batch_size": 3, "warmup_steps": 2},
            "eval": {"num_problems": 9, "every_steps": HALF, "batch_size": 3},
            "checkpoint": {"every_steps": HALF, "keep": 5},
        }
        | tables
    )
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    return path


def continued(path: Path, other: Path) -> Path:
    """The config of a run whose folder holds `other`'s first HALF steps and its checkpoint after them."""
    config = load_config(path)
    source, target = Path(load_config(other).run), Path(config.run)
    (target / "checkpoints").mkdir(parents=True)
    name = f"step-{HALF:08d}"
    subprocess.run(["cp", "-r", source / "checkpoints" / name, target / "checkpoints" / name], check=True)
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


def test_two_processes_take_the_steps_of_one(tmp_path, model, teacher_url):
    teacher = {"teacher": {"url": teacher_url}}
    lora = {"lora": {"rank": 4}, "gradient_checkpointing": True}
    one = {
        "sft": write_config(tmp_path / "sft-1", model, "sft"),
        "opd": write_config(tmp_path / "opd-1", model, "opd", **teacher),
        "lora": write_config(tmp_path / "lora-1", model, "sft", model_keys=lora),
    }
    two = {
        "sft": write_config(tmp_path / "sft-2", model, "sft"),
        "opd": write_config(tmp_path / "opd-2", model, "opd", **teacher),
        "lora": write_config(tmp_path / "lora-2", model, "sft", model_keys=lora),
    }
    one_then_two = write_config(tmp_path / "sft-1-2", model, "sft")
    two_then_one = write_config(tmp_path / "opd-2-1", model, "opd", **teacher)
    bf16 = write_config(tmp_path / "bf16-2", model, "sft", model_keys={"dtype": "bfloat16"})
    for config in one.values():
        train(load_config(config), quiet=True)
    under_torchrun(*two.values(), continued(one_then_two, one["sft"]), bf16)
    train(load_config(continued(two_then_one, two["opd"])), quiet=True)

    for name in ("sft", "opd", "lora"):
        assert curve(two[name]) == pytest.approx(curve(one[name]), abs=1e-4)
        assert curve(two[name], "grad_norm") == pytest.approx(curve(one[name], "grad_norm"), abs=1e-3)
        assert abs(curve(one[name])[0] - curve(one[name])[-1]) > 30e-4  # the runs went 30 tolerances far
    assert curve(one_then_two) == pytest.approx(curve(one["sft"]), abs=1e-4)
    assert curve(two_then_one) == pytest.approx(curve(one["opd"]), abs=1e-4)
    for name in ("length_mean", "truncation_rate", "reward", "reverse_kl"):
        assert curve(two["opd"], name) == pytest.approx(curve(one["opd"], name), abs=1e-4)
    # bfloat16 has 8 bits: its curve is the float32 one's within its rounding, and what it saves is bfloat16.
    assert curve(bf16) == pytest.approx(curve(one["sft"]), abs=0.1)
    last = checkpoint.found(Path(load_config(bf16).run) / "checkpoints")[-1]
    assert {str(tensor.dtype) for tensor in load_file(last / "model.safetensors").values()} == {"torch.bfloat16"}


def test_a_rank_that_is_killed_ends_the_run_and_the_run_goes_on_from_its_checkpoint(tmp_path, model):
    config = write_config(tmp_path / "killed", model, "sft", steps=100_000, checkpoint={"every_steps": 5})
    log = tmp_path / "log"
    command = [*TORCHRUN, "-m", "student_trainer", "train", config]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and any(row["step"] >= 6 for row in read_rows(metrics))):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - started < 30
    assert "exitcode  : -9" in log.read_text()
    for path in checkpoint.found(tmp_path / "killed" / "run" / "checkpoints"):
        checkpoint.verify(path)
