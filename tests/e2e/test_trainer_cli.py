"""The trainer's command line, as processes: what a person sees when all is well, and when it is not."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from student_trainer.study.toy import build_toy_model

pytestmark = pytest.mark.slow

USER_ERROR = 2


def trainer(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "student_trainer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tables = {
        "run": str(folder / "run"),
        "steps": 2,
        "problems_per_step": 4,
        "model": {"path": str(build_toy_model(folder / "model", hidden_size=32, num_layers=1))},
        "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
        "stage": {"kind": "sft"},
        "rollout": {"max_new_tokens": 8},
        "eval": {"num_problems": 10},
    }
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


HEAVY = {"torch", "transformers", "vllm", "datasets", "matplotlib"}


def test_help_answers_at_once():
    """Two seconds of processor time are several times a bare interpreter and less than torch's import alone."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = trainer("--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    assert done.returncode == 0
    assert "train" in done.stdout
    light = f"import sys, student_trainer.cli; sys.exit(len({HEAVY} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", light], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["optim.lrr=1"], "student-trainer: optim.lrr: unknown key; did you mean 'lr'?\n"),
        (["model.path=/nowhere"], "student-trainer: model.path '/nowhere': "),
        (["stage.kind=opd"], "student-trainer: stage opd needs a teacher: set teacher.url or pass --teacher URL\n"),
        (["stage.kind=opd", "--teacher", "grpc://127.0.0.1:9"], "student-trainer: "),
        (["stage.kind=opd", "--teacher", "localhost"], "'localhost' is not a teacher's URL"),
        (["task.min_terms=9", "task.max_terms=3"], "max_terms 3 is below min_terms 9"),
        (["eval.num_problems=11"], "eval.num_problems is 11, but task toy holds out 10"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(config, tmp_path, arguments, sentence):
    done = trainer("train", config, f"run={tmp_path / 'run'}", *arguments)
    assert done.returncode == USER_ERROR, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_config_is_one_sentence(tmp_path):
    done = trainer("train", tmp_path / "none.toml")
    assert (done.returncode, done.stderr) == (
        USER_ERROR,
        f"student-trainer: {tmp_path / 'none.toml'}: No such file or directory\n",
    )


def test_train_then_eval_then_report(config):
    done = trainer("train", config)
    assert done.returncode == 0, done.stderr
    run = config.parent / "run"
    checkpoint = run / "checkpoints" / "step-00000002"
    assert f"student: {checkpoint}\nreport:  {run / 'report.html'}\n" == done.stdout
    assert "step 2/2" in done.stderr

    output = config.parent / "eval.json"
    done = trainer("eval", config, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "on 10 held-out problems" in done.stdout
    figures = json.loads(output.read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["model"] == str(checkpoint)
    assert figures["eval/accuracy"] == last["eval/accuracy"]

    (run / "report.html").unlink()
    done = trainer("report", run)
    assert done.stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").exists()

    done = trainer("report", run, run.parent / "run", "--out", config.parent / "both.html")
    assert done.returncode == USER_ERROR
    assert "is given twice" in done.stderr


def test_generate_and_export_take_the_last_checkpoint(config, tmp_path):
    done = trainer("train", config, f"run={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "student"
    assert trainer("export", tmp_path / "run", "--out", out).stdout == f"{out}\n"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= names
    assert not {"state", "trainer.json"} & names
    refused = trainer("export", tmp_path / "run", "--out", out)
    assert (refused.returncode, "exists and is not overwritten" in refused.stderr) == (USER_ERROR, True)
    options = ["--prompt", "3+4=", "--samples", "2", "--max-new-tokens", "4", "--temperature", "0", "--json"]
    of_run, of_folder = (trainer("generate", source, *options) for source in (tmp_path / "run", out))
    rows = [json.loads(line) for line in of_run.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["3+4=", "3+4="]
    assert rows[0] == rows[1], "greedy"
    assert of_folder.stdout == of_run.stdout


def test_generate_prints_what_is_finished_and_ends_cleanly_on_ctrl_c(tmp_path):
    """Two thousand completions would take minutes; the first line is there in seconds."""
    model = build_toy_model(tmp_path / "model", hidden_size=32, num_layers=1)
    prompts = [argument for n in range(2000) for argument in ("--prompt", f"{n}+1")]
    command = [sys.executable, "-m", "student_trainer", "generate", str(model), *prompts, "--json"]
    # A shell starts what it puts in the background, and so all that follows from it, with SIGINT ignored.
    hearing = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hearing, *command, "--max-new-tokens", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert first["prompt"] == "0+1"
    lines = [json.loads(line) for line in rest.splitlines()]
    assert 1 + len(lines) < 2000
    assert process.returncode == 130
    assert "student-trainer: stopped; every completion above is whole\n" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["train", "eval", "generate", "report", "export", "init"])
def test_help_of_every_command_is_light(command):
    script = (
        "import sys, student_trainer.cli as cli\n"
        f"try:\n    cli.app(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit(len({HEAVY} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"student-trainer {command}" in done.stdout


def test_a_report_of_something_else_is_one_sentence(tmp_path):
    done = trainer("report", tmp_path)
    assert done.returncode == USER_ERROR
    assert "is not a run folder" in done.stderr
