"""A run killed with SIGKILL at any moment gives, gone on with, the numbers of the run that was never killed."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from safetensors.torch import load_file

from student_trainer import checkpoint
from student_trainer.config import TrainConfig, parse_config
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import build_toy_model
from tests.harness import LoopThread, server_of
from tests.toy_run import toy_run
from tests.warm import start_train

pytestmark = pytest.mark.slow

SEED = 1618
STEPS = 64
"""Enough that thirty kills, none of which lets the run go on for more than a few steps, leave some of them."""

MOMENTS = ["start"] * 9 + ["step"] * 12 + ["checkpoint"] * 9
"""Of the kills: while the process starts, within a step (sampling, scoring, learning, logging), while it saves."""

START_S, STEP_S, SAVE_S = 1.0, 0.1, 0.04
"""How long each takes at most; a kill falls anywhere in it."""

TIMES = {"rollout_s", "score_s", "step_s", "watch_s", "scored_tokens_per_s"}
LOGS = ("metrics.jsonl", "rollouts.jsonl", "alarms.jsonl", "roll_backs.jsonl", "rolled_back.jsonl")


@pytest.fixture(scope="module")
def teacher_url(run: LoopThread, tmp_path_factory):
    model = build_toy_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, num_layers=1, seed=1)
    with server_of(run, model) as server:
        yield server.url("http")


def config(folder: Path, url: str) -> TrainConfig:
    """The rate rises by 1e-4 a step: above 1.25e-3 from step 13 on, so that step 14 is rolled back to 12, once."""
    model = build_toy_model(folder.parent / "student", hidden_size=32, num_layers=1)
    rule = {"signal": "lr", "above": 1.25e-3, "for_steps": 2, "action": "roll_back", "lr_scale": 0.1}
    tables = {
        "steps": STEPS,
        "problems_per_step": 2,
        "teacher": {"url": url},
        "stage": {"kind": "opd", "loss": {"top_k": 5}},
        "rollout": {"max_new_tokens": 5},
        "optim": {"lr": 4e-3, "warmup_steps": 40},
        "checkpoint": {"every_steps": 2},
        "watch": {"rules": [rule]},
    }
    return parse_config(toy_run(folder, model, **tables))


def num_rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(read_rows(metrics)) if metrics.exists() else 0


def is_saving(run: Path, since: float) -> bool:
    """Whether a checkpoint begun after `since` is half written."""
    return any(path.stat().st_mtime > since for path in (run / "checkpoints").glob(".step-*.partial"))


def kill_once(config: TrainConfig, moment: str, random: Random) -> str:
    """Starts the run and kills it at such a moment; what it was doing, or "finished" when it was too quick."""
    run = Path(config.run)
    began, before = time.time(), num_rows(run)
    process = start_train(config)
    try:
        if moment == "start":
            due = began + random.uniform(0, START_S)
            while time.time() < due and num_rows(run) == before:
                time.sleep(0.0005)
        else:
            while process.is_alive() and not (
                is_saving(run, began) if moment == "checkpoint" else num_rows(run) > before
            ):
                time.sleep(0.0005)
                assert time.time() - began < 60
            due = time.time() + random.uniform(0, SAVE_S if moment == "checkpoint" else STEP_S)
            while time.time() < due and num_rows(run) <= before + 2:
                time.sleep(0.0005)
    finally:
        process.kill()
        process.join()
    if process.exitcode == 0:
        return "finished"
    assert process.exitcode == -9
    return "saving" if is_saving(run, began) else "starting" if moment == "start" else "in a step"


def outcome(config: TrainConfig):
    run = Path(config.run)
    logs = {name: read_rows(run / name) for name in LOGS}
    for name in ("metrics.jsonl", "rolled_back.jsonl"):
        logs[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in logs[name]]
    return logs, load_file(checkpoint.found(run / "checkpoints")[-1] / "model.safetensors")


def finish(config: TrainConfig) -> None:
    process = start_train(config)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.timeout(200)
def test_killed_at_any_moment_it_resumes_bit_for_bit(tmp_path, teacher_url):
    random = Random(SEED)
    moments = random.sample(MOMENTS, len(MOMENTS))
    killed = config(tmp_path / "killed", teacher_url)
    kills = Counter(kill_once(killed, moment, random) for moment in moments)
    finish(killed)
    unbroken = config(tmp_path / "unbroken", teacher_url)
    finish(unbroken)
    logs, weights = outcome(unbroken)
    killed_logs, killed_weights = outcome(killed)
    assert [row["step"] for row in logs["metrics.jsonl"]] == list(range(STEPS + 1))
    assert [row["step"] for row in logs["rolled_back.jsonl"]] == [13, 14]
    assert killed_logs == logs
    assert all(weights[name].equal(killed_weights[name]) for name in weights)
    assert kills["finished"] == 0
    assert kills["saving"] >= 5
    assert kills["starting"] >= 5
    assert kills["in a step"] >= 5
