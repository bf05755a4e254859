"""Disks that refuse: real limits of the operating system, met by real runs."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load, load_file

from student_trainer import checkpoint
from student_trainer.checkpoint import CheckpointError
from student_trainer.config import ConfigError, parse_config
from student_trainer.loop import train
from student_trainer.run_folder import RunFolder, RunFolderError, read_rows
from student_trainer.stopped import StoppedByRule
from student_trainer.study.toy import build_toy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


def config(run, model, **tables):
    return parse_config(
        {
            "run": str(run),
            "steps": 4,
            "problems_per_step": 4,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 100, "held_out_size": 10},
            "stage": {"kind": "sft"},
            "rollout": {"max_new_tokens": 2},
            "eval": {"num_problems": 2},
            "checkpoint": {"every_steps": 2},
        }
        | tables
    )


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to make any file larger: EFBIG, where a full disk gives ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def size_of(folder: Path, name: str) -> int:
    return (folder / name).stat().st_size


@pytest.mark.parametrize("file", ["model.safetensors", "state/__0_0.distcp"])
def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_the_one_before_is_whole(tmp_path, model, file):
    """The state is written first: three times the model, so the limit just below either meets that one."""
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    last = train(config(unbroken, model), quiet=True)
    assert size_of(last, "state/__0_0.distcp") > size_of(last, "model.safetensors") + 1000
    folder = run / "checkpoints"
    first = {"checkpoint": {"every_steps": 2}, "watch": {"rules": [{"signal": "loss", "above": 0, "action": "stop"}]}}
    with pytest.raises(StoppedByRule):
        train(config(run, model, **first), quiet=True)
    with largest_file(size_of(last, file) - 1000), pytest.raises(CheckpointError) as caught:
        train(config(run, model), quiet=True)
    assert re.fullmatch(
        rf"checkpoint {folder}/step-00000002 could not be written: .*\([\d,]+ MiB are free there\); earlier ones are "
        "whole: mend the disk and run the same command to go on",
        str(caught.value),
    )
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    weights = load_file(train(config(run, model), quiet=True) / "model.safetensors")
    assert all(tensor.equal(weights[name]) for name, tensor in load_file(last / "model.safetensors").items())


def test_a_log_on_a_full_disk_is_one_sentence(tmp_path, model):
    settings = config(tmp_path / "run", model)
    RunFolder(settings)
    (tmp_path / "run" / "alarms.jsonl").touch()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    run = RunFolder(settings)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl cannot be written: No space left on device; the last"):
        run.log({"step": 0})


@pytest.mark.parametrize("run", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_one_sentence(model, run):
    with pytest.raises(ConfigError, match=rf"run folder {run}: (No such file|Not a directory|Permission denied)"):
        train(config(run, model), quiet=True)


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path, model):
    folder = tmp_path / "run" / "checkpoints"
    for name in (".step-00000009.partial", ".step-00000001.removed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("half")
    train(config(tmp_path / "run", model), quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in checkpoint.found(folder)]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink])
def test_a_corrupt_checkpoint_is_put_aside_and_the_one_before_is_gone_on_with(tmp_path, model, caplog, damage):
    last = train(config(tmp_path / "run", model), quiet=True)
    weights = load((last / "model.safetensors").read_bytes())  # and not what maps the file that is damaged next
    damage(last / "model.safetensors")
    assert train(config(tmp_path / "run", model), quiet=True) == last
    assert re.search(r"step-00000004 is damaged: .*model\.safetensors.*; going on from step-00000002", caplog.text)
    assert all(tensor.equal(weights[name]) for name, tensor in load_file(last / "model.safetensors").items())
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_without_a_whole_checkpoint_nothing_is_overwritten(tmp_path, model):
    last = train(config(tmp_path / "run", model, checkpoint={"every_steps": 4}), quiet=True)
    cut_short(last / "trainer.json")
    with pytest.raises(RunFolderError, match=r"step-00000004 is damaged: trainer\.json .*; no checkpoint is whole"):
        train(config(tmp_path / "run", model), quiet=True)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 5
    assert (last.parent / "damaged-step-00000004").is_dir()
