"""Checkpoints: written whole or not at all, and read back to the same numbers bit for bit, by any number of ranks.

A checkpoint `step-00000100` is the state after 100 optimiser steps:

    model.safetensors, config.json, tokenizer …   what any engine serves; a LoRA run has its adapter's folder instead
    state/                                        float32 weights and AdamW's moments (torch.distributed.checkpoint)
    trainer.json                                  steps, schedule, and every other file's size and CRC-32
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer.distributed import is_main, share, together, whole, world_size
from student_trainer.student import Student

STATE_FOLDER = "state"
TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"step-(\d{8})")
LORA = ".lora_"
"""In the names of an adapter's weights, and of no other."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK_BYTES = 1 << 24


def save(
    folder: Path,
    num_steps: int,
    student: Student,
    weights: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    schedule: LambdaLR,
    *,
    keep: int,
) -> Path:
    """Writes `folder/step-N` atomically (a hidden folder, flushed to disk, then renamed); keeps the `keep` newest.

    Every rank calls it; each writes its shards.

    Args:
        weights: what the optimiser steps, by name.

    Raises:
        OSError: the disk refused, on any rank; what was there before is untouched.
    """
    final = folder / f"step-{num_steps:08d}"
    partial = folder / f".{final.name}.partial"
    _on_main(lambda: _empty(partial))
    _save_state(partial / STATE_FOLDER, _state(weights, optimizer))
    model_state = _whole_state(student)
    _on_main(lambda: _save_model(partial, student, model_state))
    files = _file_sums(partial)
    trainer = {"num_steps": num_steps, "schedule": schedule.state_dict(), "files": files}
    _on_main(lambda: _finish(partial, final, trainer, keep))
    return final


def found(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def verify(path: Path) -> None:
    """Reads every file of a checkpoint and compares it with what was written. Every rank calls it, and reads a share.

    Raises:
        ValueError: a file is missing, cut short or damaged, on any rank; the message names it.
    """
    expected = _trainer(path)["files"]
    actual = _file_sums(path)
    for name, entry in expected.items():
        if name not in actual:
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing")
        if actual[name] != entry:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {actual[name]['bytes']} bytes and CRC-32 "
                f"{actual[name]['crc32']}, and was written with {entry['bytes']} and {entry['crc32']}"
            )


def restore(path: Path, weights: Mapping[str, nn.Parameter], optimizer: AdamW, schedule: LambdaLR) -> int:
    """Puts a checkpoint's state into the three objects in place; returns the steps it had done.

    Raises:
        ValueError: the checkpoint is damaged, or does not fit the model.
    """
    verify(path)
    trainer = _trainer(path)
    state = _state(weights, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            load_shards(state, checkpoint_id=path / STATE_FOLDER, no_dist=world_size() == 1)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} does not fit the model: {_cause(error)}") from error
    for index, (name, weight) in enumerate(weights.items()):
        optimizer.state[weight] = {
            "step": state["num_updates"][index].clone(),
            **{moment: state[f"{moment}.{name}"] for moment in _MOMENTS},
        }
    schedule.load_state_dict(trainer["schedule"])
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    return int(trainer["num_steps"])


def _state(weights: Mapping[str, nn.Parameter], optimizer: AdamW) -> dict[str, torch.Tensor]:
    """What the optimiser holds, flat; a weight that was never stepped has zero moments, as AdamW starts them."""
    state = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    num_updates: list[float] = []
    for name, weight in weights.items():
        held = optimizer.state.get(weight, {})
        num_updates.append(float(held.get("step", 0)))
        state |= {f"{moment}.{name}": held.get(moment, torch.zeros_like(weight.detach())) for moment in _MOMENTS}
    return state | {"num_updates": torch.tensor(num_updates)}


def _save_state(folder: Path, state: dict[str, torch.Tensor]) -> None:
    writer = FileSystemWriter(folder, sync_files=False)  # every file is flushed where it is summed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            save_shards(state, storage_writer=writer, no_dist=world_size() == 1)
    except CheckpointException as error:
        raise OSError(f"{folder}: {_cause(error)}") from error


def _whole_state(student: Student) -> dict[str, torch.Tensor]:
    """The tensors that others load, in the model's dtype, on rank 0; empty elsewhere. One at a time is made whole."""
    tensors = student.model.state_dict()
    tied = student.model.all_tied_weights_keys
    names = [name for name in tensors if (LORA in name if student.is_adapted else name not in tied)]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        tensor = tensors[name]
        value = whole(tensor)
        if is_main():
            state[name] = value.to("cpu", student.dtype) if value.is_floating_point() else value.cpu()
    return state


def _save_model(folder: Path, student: Student, state: dict[str, torch.Tensor]) -> None:
    try:
        student.model.save_pretrained(folder, state_dict=state)
        if not student.is_adapted:  # save_pretrained has written the dtype of the shards
            student.model.config.dtype = student.dtype
            student.model.config.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, trainer: dict[str, Any], keep: int) -> None:
    (partial / TRAINER_FILE).write_text(json.dumps(trainer, indent=1))
    for path in (partial / TRAINER_FILE, partial / STATE_FOLDER, partial):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    for old in found(final.parent)[:-keep]:
        shutil.rmtree(old)


def _file_sums(folder: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file but trainer.json, flushed to disk; each rank reads a share of them."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != TRAINER_FILE)
    sums = together(lambda: {name: _file_sum(folder / name) for name in share(names)})
    return {name: entry for part in sums for name, entry in part.items()}


def _file_sum(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "crc32": crc}


def _trainer(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / TRAINER_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {TRAINER_FILE} cannot be read ({error})") from error


def _on_main(work: Callable[[], None]) -> None:
    """Rank 0 does it; where it fails, every rank raises."""
    together(lambda: work() if is_main() else None)


def _cause(error: BaseException) -> str:
    """The first rank's reason, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
