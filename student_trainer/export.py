"""From a run or a checkpoint to a plain model folder: safetensors, config and tokenizer, and nothing of the trainer."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from transformers import AutoTokenizer

from student_trainer import checkpoint
from student_trainer.student import ADAPTER_FILE, load_merged


def export(source: Path, out: Path) -> Path:
    """Writes the model of a checkpoint, or of a run's last one, to the new folder `out`; an adapter is merged.

    Raises:
        ValueError: `source` is neither, is damaged, or `out` is there already.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder, or delete it")
    found = checkpoint.found(source / "checkpoints")
    path = found[-1] if found else source
    if not (path / checkpoint.TRAINER_FILE).is_file():
        raise ValueError(f"{source} is neither a checkpoint nor a run folder that has one")
    checkpoint.verify(path)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if (path / ADAPTER_FILE).is_file():
        _merge(path, partial)
    else:
        shutil.copytree(path, partial, ignore=shutil.ignore_patterns(checkpoint.STATE_FOLDER, checkpoint.TRAINER_FILE))
    partial.rename(out)
    return out


def _merge(path: Path, out: Path) -> None:
    """Adds the adapter to its base in float32, and rounds once to the dtype it was trained in."""
    import torch

    with safe_open(path / "adapter_model.safetensors", "pt") as tensors:
        dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    model = load_merged(str(path), None, torch.float32).to(dtype)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
