"""The sinks for real: what is written to each is read back with its reader, or skipped where it is not installed."""

# The package is optional, and its names are unknown where it is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from student_trainer.config import ConfigError, TrainConfig, parse_config
from student_trainer.loop import train
from student_trainer.run_folder import RunFolder, read_rows
from student_trainer.study.toy import build_toy_model
from student_trainer.tracking import follow
from student_trainer.tracking.follow import Unfailing

ALARM = {
    "step": 2,
    "signal": "entropy",
    "value": 0.125,
    "threshold": 0.25,
    "side": "below",
    "action": "warn",
    "num_steps": 2,
    "sentence": "entropy 0.125 is below 0.25",
}


def config(folder: Path, *sinks: str, **tables: Any) -> TrainConfig:
    return parse_config(
        {
            "run": str(folder / "run"),
            "steps": 4,
            "model": {"path": "m"},
            "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
            "stage": {"kind": "sft"},
            "tracking": {"sinks": list(sinks), "project": "test"},
        }
        | tables
    )


def log_twice(settings: TrainConfig) -> RunFolder:
    """A run of steps 1, 2 (with an alarm) and 3 that is killed, and goes on after step 2 with another step 3, and 4."""
    run = RunFolder(settings)
    with follow(run, settings):
        for step in (1, 2, 3):
            run.log({"step": step, "loss": 1 / step, "grad_norm": math.nan, "note": "text"})
            if step == 2:
                run.log_alarm(ALARM)
    resumed = RunFolder(settings)
    resumed.forget_after(2)
    with follow(resumed, settings):
        for step in (3, 4):
            resumed.log({"step": step, "loss": 10 / step, "grad_norm": 0.5})
    return resumed


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = log_twice(config(tmp_path, "tensorboard"))
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "grad_norm"]
    # Step 3 stands once, as it was done the second time: 10 / 3, in the file's float32.
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(10 / 3)),
        (4, 2.5),
    ]
    assert [math.isnan(event.value) for event in events.Scalars("grad_norm")] == [True, True, False, False]
    [alarm] = events.Tensors("alarm/entropy/text_summary")
    assert (alarm.step, alarm.tensor_proto.string_val) == (2, [ALARM["sentence"].encode()])
    config_text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert 'sinks = [\n    "tensorboard",\n]' in config_text


def test_a_training_run_is_shown_as_its_folder_has_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = build_toy_model(tmp_path / "model", hidden_size=32, num_layers=1)
    small = {"steps": 2, "problems_per_step": 4, "rollout": {"max_new_tokens": 8}, "eval": {"num_problems": 10}}
    train(config(tmp_path, "tensorboard", model={"path": str(model)}, **small), quiet=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    logged = {(name, row["step"]): value for row in rows for name, value in row.items() if name != "step"}
    assert {step for _, step in logged} == {0, 1, 2}
    assert shown == pytest.approx(logged)


def test_wandb_keeps_the_id_of_a_resumed_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = log_twice(config(tmp_path, "wandb"))
    wandb.teardown()  # its own process, which writes the files, ends
    files = sorted((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    # Offline, each start has its own files; the same id makes them one run once they are synchronised.
    run_id = (run.path / "tracking_id").read_text().strip()
    assert {record.run.run_id for record in records if record.HasField("run")} == {run_id}
    history = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["step"], row["loss"]) for row in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 10 / 3), (4, 2.5)]
    assert [record.alert.text for record in records if record.HasField("alert")] == [ALARM["sentence"]]


def wandb_records(file: Path) -> Iterator[Any]:
    """A .wandb file's records: a header of 7 bytes, then LevelDB's log format (checksum, length, type, data)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    data, at = file.read_bytes(), 7
    assert len(data) < 2**15, "one block: no record is split"
    while at + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        assert kind == 1, "a whole record"
        yield Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length


def test_trackio_goes_on_with_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    run = log_twice(config(tmp_path, "trackio"))
    name = f"run-{(run.path / 'tracking_id').read_text().strip()}"
    assert SQLiteStorage.get_runs("test") == [name]
    rows = SQLiteStorage.get_logs("test", name)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 10 / 3), (4, 2.5)]
    assert [alert["text"] for alert in SQLiteStorage.get_alerts("test")] == [ALARM["sentence"]]


def test_a_package_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    settings = config(tmp_path, "wandb")
    sentence = r"^tracking\.sinks names wandb, which is not installed: pip install 'opd\[tracking\]'$"
    with pytest.raises(ConfigError, match=sentence), follow(RunFolder(settings), settings):
        pass


class Breaking:
    """A sink whose second step cannot be sent."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def start(self, config: Mapping[str, Any]) -> None:
        self.heard.append("start")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2:
            raise ConnectionError("the network is gone")
        self.heard.append((step, dict(metrics)))

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        self.heard.append(alarm)

    def finish(self) -> None:
        self.heard.append("finish")


def test_a_sink_that_fails_warns_once_and_the_run_goes_on(tmp_path, caplog):
    sink = Breaking()
    run = RunFolder(config(tmp_path))
    run.listeners.append(Unfailing("wandb", sink))
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 0.5, "is_finished": True})
    run.log_alarm(ALARM)
    assert sink.heard == [(1, {"loss": 0.5})]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed and gets nothing more of this run, which goes on: ConnectionError: the network is gone"
    ]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert read_rows(run.path / "alarms.jsonl") == [ALARM]
