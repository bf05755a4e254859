import pytest

from student_trainer.config import ConfigError, parse_config
from student_trainer.run_folder import RunFolder, read_rows


def config(run, **changes):
    tables = {
        "run": str(run),
        "steps": 5,
        "model": {"path": "m"},
        "task": {"kind": "toy"},
        "stage": {"kind": "sft"},
    }
    return parse_config(tables | changes)


def test_the_same_config_goes_on_and_another_is_refused_by_name(tmp_path):
    RunFolder(config(tmp_path / "run"))
    RunFolder(config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"holds a run with another optim\.lr, seed: choose another `run`"):
        RunFolder(config(tmp_path / "run", seed=1, optim={"lr": 1.0}))


def test_a_resumed_run_may_find_its_teacher_elsewhere(tmp_path):
    opd = {"stage": {"kind": "opd"}}
    RunFolder(config(tmp_path / "run", teacher={"url": "grpc://a:1"}, **opd))
    run = RunFolder(config(tmp_path / "run", teacher={"url": "grpc://b:2"}, **opd))
    assert 'url = "grpc://b:2"' in (run.path / "config.toml").read_text()


def test_a_step_to_be_done_again_is_forgotten(tmp_path):
    run = RunFolder(config(tmp_path / "run"))
    for step in range(4):
        run.log({"step": step, "loss": step / 2})
    run.log_rollouts([{"step": 1, "text": "a"}, {"step": 3, "text": "b"}])
    run.forget_after(2)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert read_rows(run.path / "rollouts.jsonl") == [{"step": 1, "text": "a"}]


def test_a_line_cut_short_by_a_killed_process_is_left_out(tmp_path):
    run = RunFolder(config(tmp_path / "run"))
    run.log({"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.forget_after(1)
    run.log({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run folder .*file/run: Not a directory"):
        RunFolder(config(tmp_path / "file" / "run"))
