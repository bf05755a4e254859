"""A run killed with SIGKILL and started again gives the numbers of the run that was never killed, bit for bit.

The teacher is the transformers engine, which scores each item alone: its numbers do not depend on what is scored beside
an item, so the whole system is deterministic.
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
from student_trainer.run_folder import read_rows
from student_trainer.study.teacher_process import teacher_process
from student_trainer.study.toy import build_toy_model

pytestmark = pytest.mark.slow

STEPS = 12
TIMES = {"rollout_s", "score_s", "step_s", "watch_s", "scored_tokens_per_s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("student"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = build_toy_model(folder / "model", hidden_size=32, num_layers=1, seed=1)
    with teacher_process(model, folder, engine="transformers") as process:
        yield process.wait()


def write_config(folder: Path, model: Path, stage: dict, **tables) -> Path:
    config = parse_config(
        {
            "run": str(folder / "run"),
            "steps": STEPS,
            "problems_per_step": 8,
            "seed": 5,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 200, "held_out_size": 20},
            "stage": stage,
            "rollout": {"max_new_tokens": 12},
            "optim": {"lr": 1e-2, "micro_batch_size": 4},
            "eval": {"num_problems": 20, "every_steps": 4},
            "checkpoint": {"every_steps": 3},
        }
        | tables
    )
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    return path


def start(config: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "student_trainer", "train", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(config: Path) -> None:
    process = start(config)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def kill_after_step(config: Path, step: int) -> None:
    """SIGKILL as soon as the metrics of `step` are on disk."""
    metrics = config.parent / "run" / "metrics.jsonl"
    process = start(config)
    deadline = time.monotonic() + 240
    while not (metrics.exists() and any(row["step"] >= step for row in read_rows(metrics))):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def outcome(config: Path):
    """Every logged number but the clock's, and the last checkpoint's weights and optimiser state."""
    run = config.parent / "run"
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]
    last = checkpoint.found(run / "checkpoints")[-1]
    return rows, read_rows(run / "rollouts.jsonl"), load_file(last / "model.safetensors")


def assert_resumes_bit_for_bit(unbroken: Path, broken: Path) -> None:
    finish(unbroken)
    for step in (1, 5):  # before the first checkpoint, and between the first and the second
        kill_after_step(broken, step)
    finish(broken)
    rows, rollouts, weights = outcome(unbroken)
    broken_rows, broken_rollouts, broken_weights = outcome(broken)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert broken_rows == rows
    assert broken_rollouts == rollouts
    assert weights.keys() == broken_weights.keys()
    assert all(weights[name].equal(broken_weights[name]) for name in weights)
    initial = load_file(Path(load_config(unbroken).model.path) / "model.safetensors")
    assert not any(weights[name].equal(tensor) for name, tensor in initial.items())


def test_sft_resumes_bit_for_bit(tmp_path, model):
    unbroken, broken = (write_config(tmp_path / name, model, {"kind": "sft"}) for name in ("unbroken", "broken"))
    assert_resumes_bit_for_bit(unbroken, broken)


def test_opd_resumes_bit_for_bit_over_the_network(tmp_path, model, teacher):
    unbroken, broken = (
        write_config(tmp_path / name, model, {"kind": "opd"}, teacher={"url": teacher["grpc_url"]})
        for name in ("unbroken", "broken")
    )
    assert_resumes_bit_for_bit(unbroken, broken)
