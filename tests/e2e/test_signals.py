"""SIGTERM and SIGINT end a run with a checkpoint, and the exit code says how it ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from student_trainer import checkpoint
from student_trainer.study.toy import build_toy_model
from tests.chaos_proxy import ChaosProxy, Faults
from tests.harness import LoopThread, server_of
from tests.toy_run import write_toy_run
from tests.warm import last_step, start_command, wait_for_step

pytestmark = pytest.mark.slow

STOPPED_BY_RULE = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


def write_config(folder: Path, model: Path, **tables) -> Path:
    """A run that only a signal or a rule ends."""
    endless = {
        "steps": 10_000,
        "problems_per_step": 4,
        "rollout": {"max_new_tokens": 4},
        "checkpoint": {"every_steps": 5000},
    }
    return write_toy_run(folder, model, **endless | tables)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, model, signum):
    run = tmp_path / "run"
    process = start_command(write_config(tmp_path, model))
    wait_for_step(process, run, 3)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum
    assert checkpoint.num_steps_of(checkpoint.found(run / "checkpoints")[-1]) == last_step(run)


def test_a_signal_ends_the_wait_for_a_teacher(run: LoopThread, tmp_path, model):
    with server_of(run, model) as server:
        proxy = run(ChaosProxy.start(int(server.url("http").rpartition(":")[2]), 0))
        teacher = {"url": f"http://127.0.0.1:{proxy.port}"}
        process = start_command(write_config(tmp_path, model, stage={"kind": "opd"}, teacher=teacher))
        folder = tmp_path / "run"
        wait_for_step(process, folder, 2)
        proxy.faults = Faults(cut=1.0)
        time.sleep(1.0)
        num_done = last_step(folder)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        process.join(60)
        assert time.monotonic() - began < 10
        assert process.exitcode == 128 + signal.SIGTERM
        assert checkpoint.num_steps_of(checkpoint.found(folder / "checkpoints")[-1]) == last_step(folder) == num_done
        run(proxy.stop())


def test_a_rule_that_stops_has_an_exit_code_of_its_own(tmp_path, model):
    rule = {"signal": "loss", "above": 0.0, "action": "stop"}
    process = start_command(write_config(tmp_path, model, watch={"rules": [rule]}))
    process.join(60)
    assert process.exitcode == STOPPED_BY_RULE
    assert last_step(tmp_path / "run") == 1
