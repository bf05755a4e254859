"""What follows from an alarm, in real runs: SFT in the toy world, with signals whose course is known beforehand."""

import logging

import pytest
from safetensors.torch import load_file

from student_trainer import checkpoint
from student_trainer.config import parse_config
from student_trainer.loop import train
from student_trainer.run_folder import RunFolder, RunFolderError, read_rows
from student_trainer.stopped import StoppedByRule
from student_trainer.study.toy import build_toy_model

TIMES = {"step_s", "watch_s"}
STEPS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


def config(run, model, *rules, **tables):
    watch = {"rules": list(rules)} | tables.pop("watch", {})
    return parse_config(
        {
            "run": str(run),
            "steps": STEPS,
            "problems_per_step": 4,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 100, "held_out_size": 10},
            "stage": {"kind": "sft"},
            "rollout": {"max_new_tokens": 2},
            "eval": {"num_problems": 2},
            "optim": {"lr": 2e-2, "warmup_steps": 20},
            "checkpoint": {"every_steps": 2},
            "watch": watch,
        }
        | tables
    )


def rows_of(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def weights_of(run):
    return load_file(checkpoint.found(run / "checkpoints")[-1] / "model.safetensors")


def assert_equal_runs(run, other):
    assert rows_of(run) == rows_of(other)
    weights, others = weights_of(run), weights_of(other)
    assert all(weights[name].equal(others[name]) for name in weights)


# The rate of step s, from 1, is lr * s / 20 while it warms up: 1e-3 a step at lr 2e-2.


def test_a_warning_is_written_down_and_the_run_goes_on(tmp_path, model, caplog):
    rule = {"signal": "lr", "above": 2.5e-3, "for_steps": 2}
    train(config(tmp_path / "run", model, rule, steps=5), quiet=True)
    (alarm,) = read_rows(tmp_path / "run" / "alarms.jsonl")
    # 3e-3 at step 3 is the first above, step 4 the second.
    assert alarm == {
        "step": 4,
        "signal": "lr",
        "value": pytest.approx(4e-3),
        "threshold": 2.5e-3,
        "side": "above",
        "action": "warn",
        "num_steps": 4,
        "sentence": "step 4: lr is 0.004, above 0.0025 since step 3, after 4 steps in all",
    }
    assert alarm["sentence"] in caplog.messages
    assert rows_of(tmp_path / "run")[-1]["step"] == 5


def test_a_stop_leaves_a_checkpoint_and_holds_until_the_rule_is_changed(tmp_path, model):
    rule = {"signal": "lr", "above": 4.5e-3, "action": "stop"}
    settings = config(tmp_path / "run", model, rule)
    for _ in range(2):  # the second time without a step
        with pytest.raises(StoppedByRule, match=r"step 5: lr is 0\.005, above 0\.0045, after 5 steps in all"):
            train(settings, quiet=True)
        assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(6))
        assert checkpoint.found(tmp_path / "run" / "checkpoints")[-1].name == "step-00000005"
    train(config(tmp_path / "run", model), quiet=True)
    train(config(tmp_path / "unbroken", model), quiet=True)
    assert_equal_runs(tmp_path / "run", tmp_path / "unbroken")


def test_a_roll_back_goes_on_with_a_smaller_step_until_there_were_too_many(tmp_path, model):
    rule = {"signal": "lr", "above": 5.7e-3, "for_steps": 3, "action": "roll_back", "lr_scale": 0.5}
    run = tmp_path / "run"
    with pytest.raises(StoppedByRule, match=r"as often as watch\.max_roll_backs allows"):
        train(config(run, model, rule, watch={"max_roll_backs": 1}), quiet=True)
    # At 1e-3 a step: above from step 6 on, sounds at 8, and the last checkpoint before 6 is 4, kept though only the two
    # newest are. At .5e-3 a step from there: above from 12 on, sounds at 14, and stops.
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(15))
    lrs = [1e-3 * step if step <= 4 else 0.5e-3 * step for step in range(1, 15)]
    assert [row["lr"] for row in rows[1:]] == pytest.approx(lrs)
    undone = read_rows(run / "rolled_back.jsonl")
    assert [(row["roll_back"], row["step"]) for row in undone] == [(1, step) for step in (5, 6, 7, 8)]
    alarms = read_rows(run / "alarms.jsonl")
    assert [(a["step"], a["action"], a["num_steps"]) for a in alarms] == [(8, "roll_back", 8), (14, "stop", 18)]
    assert [row["step"] for row in rows if "event" in row] == [5]
    assert rows[5]["event"] == f"rolled back: {alarms[0]['sentence']}"
    assert [row.get("roll_backs") for row in rows] == [None] * 5 + [1] * 10
    (roll_back,) = read_rows(run / "roll_backs.jsonl")
    assert (roll_back["from_step"], roll_back["to_step"], roll_back["lr_scale"]) == (8, 4, 0.5)


def test_a_rolled_back_run_resumes_bit_for_bit(tmp_path, model):
    """One is stopped after its roll-back by another rule, and goes on without that rule."""
    roll_back = {"signal": "lr", "above": 5.7e-3, "action": "roll_back", "lr_scale": 0.5}
    train(config(tmp_path / "unbroken", model, roll_back, steps=11), quiet=True)
    stop = {"signal": "lr", "above": 4.2e-3, "from_step": 9, "action": "stop"}  # 4.5e-3 at step 9
    with pytest.raises(StoppedByRule):
        train(config(tmp_path / "broken", model, roll_back, stop, steps=11), quiet=True)
    train(config(tmp_path / "broken", model, roll_back, steps=11), quiet=True)
    assert_equal_runs(tmp_path / "broken", tmp_path / "unbroken")
    assert len(read_rows(tmp_path / "broken" / "roll_backs.jsonl")) == 1


def test_a_roll_back_without_a_checkpoint_from_before_stops(tmp_path, model):
    """The rule is new: no checkpoint was kept for it."""
    run = tmp_path / "run"
    stop = {"signal": "lr", "above": 6.5e-3, "action": "stop"}
    with pytest.raises(StoppedByRule):
        train(config(run, model, stop, checkpoint={"every_steps": 2, "keep": 1}), quiet=True)
    roll_back = {"signal": "lr", "above": 0.5e-3, "action": "roll_back", "lr_scale": 0.5}
    with pytest.raises(StoppedByRule, match="no checkpoint from before it is left"):
        train(config(run, model, roll_back, checkpoint={"every_steps": 2, "keep": 1}), quiet=True)


def test_a_rule_on_a_metric_that_does_not_exist_is_doubted(tmp_path, model, caplog):
    train(config(tmp_path / "run", model, {"signal": "los", "above": 9}, steps=2), quiet=True)
    assert "watch.rules: this run logs no 'los', so the rule never sounds; did you mean 'loss'?" in caplog.messages


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (flip_a_byte, "model.safetensors"),
        (truncate, "state/__0_0.distcp"),
        (remove, "trainer.json"),
        (truncate, "SHA256SUMS"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, model, caplog, damage, file):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    train(config(unbroken, model, steps=6), quiet=True)
    stop = {"signal": "lr", "above": 4.5e-3, "action": "stop"}
    with pytest.raises(StoppedByRule):
        train(config(run, model, stop, steps=6), quiet=True)
    damage(run / "checkpoints" / "step-00000005" / file)
    train(config(run, model, steps=6), quiet=True)
    (said,) = [r.message for r in caplog.records if r.name.startswith("student_trainer") and "damaged" in r.message]
    assert f"{run}/checkpoints/step-00000005 is damaged: " in said
    assert file in said
    assert said.endswith("; going on from step-00000004")
    assert_equal_runs(run, unbroken)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(tmp_path, model):
    settings = config(tmp_path / "run", model, steps=2)
    flip_a_byte(train(settings, quiet=True) / "model.safetensors")
    with pytest.raises(RunFolderError, match="no checkpoint is whole: put one back from a copy"):
        train(settings, quiet=True)
    assert len(RunFolder(settings).metrics()) == 3


def test_nothing_is_said_of_a_run_that_is_well(tmp_path, model, caplog):
    with caplog.at_level(logging.INFO, "student_trainer"):
        train(config(tmp_path / "run", model, steps=2), quiet=True)
    assert caplog.messages == []
