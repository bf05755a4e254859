"""The config of a tiny run in the toy world, of which each test says what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from student_trainer.config import dump_config, parse_config


def toy_run(folder: Path, model_path: Path, **tables: Any) -> dict[str, Any]:
    """The tables of a run in `folder`: sft by that model, unless `tables` say otherwise."""
    return {
        "run": str(folder),
        "model": {"path": str(model_path)},
        "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
        "stage": {"kind": "sft"},
        "eval": {"num_problems": 2},
    } | tables


def write_toy_run(folder: Path, model_path: Path, **tables: Any) -> Path:
    """The file of such a config, in `folder`; the run is in `folder`/run."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(dump_config(parse_config(toy_run(folder / "run", model_path, **tables))))
    return path
