"""Checkpoints: written whole or not at all, sealed with checksums, and read back to the same numbers bit for bit.

A checkpoint `step-00000100` is the state after 100 optimiser steps: a model folder in transformers' format, which any
engine can serve, and beside it the optimiser's and the schedule's state, and the stage's where it has any.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.durable import flush
from student_trainer.manifest import seal

OPTIMIZER_FILE = "optimizer.pt"
STAGE_FILE = "stage.pt"
TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that could not be written; earlier ones are whole."""


def save(
    folder: Path,
    num_steps: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: AdamW,
    schedule: LambdaLR,
    stage: object,
    *,
    keep: int,
) -> Path:
    """Writes `folder/step-N` atomically (a hidden folder, flushed to disk, then renamed); keeps the `keep` newest.

    Raises:
        CheckpointError: the disk refused; what was there before is untouched, and nothing is left of the new one.
    """
    final = folder / f"step-{num_steps:08d}"
    partial = folder / f".{final.name}.partial"
    with _all_or_nothing(partial, final):
        sweep(folder)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, partial / OPTIMIZER_FILE)
        if isinstance(stage, Stateful):
            torch.save(stage.state_dict(), partial / STAGE_FILE)
        (partial / TRAINER_FILE).write_text(json.dumps({"num_steps": num_steps}))
        seal(partial)
        for path in partial.iterdir():
            flush(path)
        if final.exists():
            remove(final)
        partial.rename(final)
        flush(folder)
    for old in found(folder)[:-keep]:
        remove(old)
    return final


def remove(path: Path) -> None:
    """Deletes a checkpoint; from the first moment on it is none."""
    hidden = path.with_name(f".{path.name}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden)


def sweep(folder: Path) -> None:
    """Deletes what a killed process left half written or half deleted."""
    for left_over in folder.glob(".step-*"):
        shutil.rmtree(left_over)


def found(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def num_steps_of(path: Path) -> int:
    """The optimiser steps behind a checkpoint."""
    return int(path.name.removeprefix("step-"))


def restore(path: Path, model: PreTrainedModel, optimizer: AdamW, schedule: LambdaLR) -> int:
    """Puts a checkpoint's state into the three objects in place; returns the steps it had done.

    Raises:
        ValueError: the checkpoint does not fit the model.
    """
    weights = load_file(path / "model.safetensors")
    result = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    missing = set(result.missing_keys) - tied
    if missing or result.unexpected_keys:
        raise ValueError(f"{path} does not fit the model: missing {sorted(missing)}, extra {result.unexpected_keys}")
    state = torch.load(path / OPTIMIZER_FILE, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(json.loads((path / TRAINER_FILE).read_text())["num_steps"])


def restore_stage(path: Path, stage: object) -> None:
    """Gives a stage that has state (`Stateful`) back the state that it had at the checkpoint."""
    if isinstance(stage, Stateful):
        stage.load_state_dict(torch.load(path / STAGE_FILE, weights_only=True))


@contextmanager
def _all_or_nothing(partial: Path, final: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each of the writers has its own kind for a disk that refuses
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        free = shutil.disk_usage(next(path for path in final.parents if path.exists())).free
        raise CheckpointError(
            f"checkpoint {final} could not be written: {reason} ({free / 2**20:,.0f} MiB are free there); earlier ones "
            "are whole: mend the disk and run the same command to go on"
        ) from error
