"""Checkpoints: written whole or not at all, sealed with checksums, read back bit for bit by any number of processes.

A checkpoint `step-00000100` is the state after 100 optimiser steps: a model folder in transformers' format, which any
engine can serve, and for the trainer

    state/         what the optimiser steps, in float32, and AdamW's moments (torch.distributed.checkpoint)
    stage.pt       the stage's state, where it has any
    trainer.json   the number of steps, and the schedule
    adapter/       of a LoRA run, whose model folder has it added to the weights: the adapter alone, in peft's format
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer.distributed import by_main, world_size
from student_trainer.durable import flush
from student_trainer.lora import has_adapter
from student_trainer.manifest import seal
from student_trainer.plain_weights import adapter_weights, plain_weights
from student_trainer.student import Student

STATE_FOLDER = "state"
STAGE_FILE = "stage.pt"
TRAINER_FILE = "trainer.json"
ADAPTER_FOLDER = "adapter"
OWN_FILES = (STATE_FOLDER, STAGE_FILE, TRAINER_FILE, ADAPTER_FOLDER)
"""What a checkpoint holds for the trainer alone."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that could not be written; earlier ones are whole."""


def save(
    folder: Path,
    num_steps: int,
    student: Student,
    weights: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    schedule: LambdaLR,
    stage: object,
    *,
    keep: int,
) -> Path:
    """Writes `folder/step-N` atomically (a hidden folder, flushed to disk, then renamed); keeps the `keep` newest.

    Every rank calls it and writes its shards of the state; rank 0 writes the rest.

    Args:
        weights: what the optimiser steps, by name.

    Raises:
        CheckpointError: the disk refused; what was there before is untouched, and nothing is left of the new one.
    """
    final = folder / f"step-{num_steps:08d}"
    partial = folder / f".{final.name}.partial"

    def begin() -> None:
        with _all_or_nothing(partial, final):
            sweep(folder)
            partial.mkdir(parents=True)

    def finish() -> None:
        with _all_or_nothing(partial, final):
            _write_model(partial, student, plain, adapter)
            if stage_state is not None:
                torch.save(stage_state, partial / STAGE_FILE)
            trainer = {"num_steps": num_steps, "schedule": schedule.state_dict()}
            (partial / TRAINER_FILE).write_text(json.dumps(trainer))
            seal(partial)
            for path in (*partial.rglob("*"), partial):
                flush(path)
            if final.exists():
                remove(final)
            partial.rename(final)
            flush(folder)

    by_main(begin)
    with _all_or_nothing(partial, final):
        _save_state(partial / STATE_FOLDER, _state(weights, optimizer))
    plain = plain_weights(student.model, student.dtype)
    adapter = adapter_weights(student.model)
    stage_state = stage.state_dict() if isinstance(stage, Stateful) else None
    by_main(finish)
    by_main(lambda: [remove(old) for old in found(folder)[:-keep]])
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


def restore(path: Path, weights: Mapping[str, nn.Parameter], optimizer: AdamW, schedule: LambdaLR) -> int:
    """Puts a checkpoint's state into the three objects in place; returns the steps it had done.

    Raises:
        ValueError: the checkpoint does not fit the model.
    """
    trainer = json.loads((path / TRAINER_FILE).read_text())
    state = _state(weights, optimizer)
    try:
        with _one_process_may_call():
            load_shards(state, checkpoint_id=path / STATE_FOLDER, no_dist=world_size() == 1)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the model: {_reason(error)}") from error
    for index, (name, weight) in enumerate(weights.items()):
        optimizer.state[weight] = {
            "step": state["num_updates"][index].clone(),
            **{moment: state[f"{moment}.{name}"] for moment in _MOMENTS},
        }
    schedule.load_state_dict(trainer["schedule"])
    return int(trainer["num_steps"])


def restore_stage(path: Path, stage: object) -> None:
    """Gives a stage that has state (`Stateful`) back the state that it had at the checkpoint."""
    if isinstance(stage, Stateful):
        stage.load_state_dict(torch.load(path / STAGE_FILE, weights_only=True))


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
    writer = FileSystemWriter(folder, sync_files=False)  # all files are flushed at the end
    with _one_process_may_call():
        save_shards(state, storage_writer=writer, no_dist=world_size() == 1)


def _write_model(
    folder: Path, student: Student, plain: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]
) -> None:
    model = student.model
    if adapter:
        model.save_pretrained(folder / ADAPTER_FOLDER, state_dict=adapter)
    # A model with an adapter would write that alone; a sharded one would name the dtype of its float32 shards.
    is_adapted, model._hf_peft_config_loaded = has_adapter(model), False
    try:
        model.save_pretrained(folder, state_dict=plain)
    finally:
        model._hf_peft_config_loaded = is_adapted
    model.config.dtype = student.dtype
    model.config.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)


@contextmanager
def _one_process_may_call() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is .*", category=UserWarning)
        yield


@contextmanager
def _all_or_nothing(partial: Path, final: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # each of the writers has its own kind for a disk that refuses
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(next(path for path in final.parents if path.exists())).free
        raise CheckpointError(
            f"checkpoint {final} could not be written: {_reason(error)} ({free / 2**20:,.0f} MiB are free there); "
            "earlier ones are whole: mend the disk and run the same command to go on"
        ) from error


def _reason(error: BaseException) -> str:
    """In one line; where several ranks failed, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__
