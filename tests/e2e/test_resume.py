"""A run killed with SIGKILL and started again gives the numbers of the run that was never killed, bit for bit.

The teacher is the transformers engine, which scores each item alone: its numbers do not depend on what is scored beside
an item, so the whole system is deterministic.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from student_trainer import checkpoint
from student_trainer.config import dump_config, load_config, parse_config
from student_trainer.loop import train
from student_trainer.report import write_report
from student_trainer.run_folder import read_rows
from student_trainer.study.toy import build_toy_model
from tests.harness import LoopThread, served
from tests.warm import kill_after_step, start_train

pytestmark = pytest.mark.slow

STEPS = 12
TIMES = {"rollout_s", "score_s", "step_s", "scored_tokens_per_s", "watch_s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("student"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def teacher_url(run: LoopThread, tmp_path_factory):
    model = build_toy_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, num_layers=1, seed=1)
    with served(run, model) as url:
        yield url


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


def finish(config: Path) -> None:
    process = start_train(load_config(config))
    try:
        process.join(240)
        assert process.exitcode == 0
    finally:
        process.kill()


def outcome(config: Path):
    """Every logged number but the clock's, and the last checkpoint's weights and optimiser state."""
    run = config.parent / "run"
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]
    last = checkpoint.found(run / "checkpoints")[-1]
    return rows, read_rows(run / "rollouts.jsonl"), load_file(last / "model.safetensors")


def assert_resumes_bit_for_bit(unbroken: Path, broken: Path, killed_after: tuple[int, ...] = (1, 5)) -> None:
    """By default killed before the first checkpoint, and between the first and the second.

    The unbroken run is in this process, whose hashes of strings have another seed than those of the forked ones.
    """
    train(load_config(unbroken), quiet=True)
    for step in killed_after:
        kill_after_step(start_train(load_config(broken)), broken.parent / "run", step)
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


def test_opd_resumes_bit_for_bit_over_the_network(tmp_path, model, teacher_url):
    unbroken, broken = (
        write_config(tmp_path / name, model, {"kind": "opd"}, teacher={"url": teacher_url})
        for name in ("unbroken", "broken")
    )
    assert_resumes_bit_for_bit(unbroken, broken)


def test_opd_with_rollouts_ahead_resumes_bit_for_bit(tmp_path, model, teacher_url):
    """Every step but the first after a checkpoint learns from rollouts of the weights one step before."""
    tables = {"teacher": {"url": teacher_url}, "rollout": {"max_new_tokens": 12, "max_staleness": 1}}
    unbroken, broken = (write_config(tmp_path / name, model, {"kind": "opd"}, **tables) for name in ("a", "b"))
    assert_resumes_bit_for_bit(unbroken, broken, killed_after=(5,))
    rows = read_rows(unbroken.parent / "run" / "metrics.jsonl")
    assert [row["staleness"] for row in rows[1:]] == [0, 1, 1] * 4


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A model that knows the form of an answer and guesses the sum: some rewards are 1, some 0."""
    folder = tmp_path_factory.mktemp("warm")
    initial = build_toy_model(folder / "initial", hidden_size=32, num_layers=1)
    sft = write_config(folder / "sft", initial, {"kind": "sft"}, steps=60, task=SMALL_SUMS, problems_per_step=32)
    return train(load_config(sft), quiet=True)


SMALL_SUMS = {
    "kind": "toy",
    "train_size": 60,
    "held_out_size": 20,
    "min_terms": 2,
    "max_terms": 3,
    "max_operand": 5,
    "rule_rate": 1.0,
    "rules": ["terse"],
}


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_stage_that_learns_from_rewards_resumes_bit_for_bit(tmp_path, warm, kind):
    """The critic's weights and optimiser among what is kept: step 6's advantages come from what step 5 taught it."""
    stage = {"kind": kind, "num_minibatches": 2, "kl_coefficient": 0.05, "truncated": "punish"}
    unbroken, broken = (
        write_config(
            tmp_path / name,
            warm,
            stage,
            steps=8,
            task=SMALL_SUMS,
            rollout={"max_new_tokens": 6, "samples_per_problem": 4},
            optim={"lr": 1e-3, "micro_batch_size": 16},
        )
        for name in ("unbroken", "broken")
    )
    kill_after_step(start_train(load_config(broken)), broken.parent / "run", 5)  # after the checkpoint of step 3
    for config in (unbroken, broken):
        train(load_config(config), quiet=True)
    rows, rollouts, weights = outcome(unbroken)
    broken_rows, broken_rollouts, broken_weights = outcome(broken)
    assert sum(row["num_updates"] > 0 for row in rows[1:]) >= 4
    assert broken_rows == rows
    assert broken_rollouts == rollouts
    assert all(weights[name].equal(broken_weights[name]) for name in weights)
    states = [checkpoint.found(c.parent / "run" / "checkpoints")[-1] / "stage.pt" for c in (unbroken, broken)]
    assert [path.exists() for path in states] == [kind == "ppo"] * 2
    if kind == "ppo":
        whole, resumed = (torch.load(path, weights_only=True)["model"] for path in states)
        assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())
    write_report(unbroken.parent / "run")
