"""A student as a plain model folder: what transformers and vLLM load, without the optimiser's state."""

from __future__ import annotations

import shutil
from pathlib import Path

from student_trainer import checkpoint
from student_trainer.config import ConfigError
from student_trainer.manifest import MANIFEST


def export(run_or_checkpoint: Path, out: Path) -> Path:
    """Copies a checkpoint's model, or that of a run's last checkpoint, to the new folder `out`; returns it.

    Raises:
        ConfigError: there is no checkpoint, or `out` exists.
    """
    found = checkpoint.found(run_or_checkpoint / "checkpoints")
    source = found[-1] if found else run_or_checkpoint
    if not (source / checkpoint.TRAINER_FILE).is_file():
        raise ConfigError(f"{run_or_checkpoint} is neither a run folder with a checkpoint nor a checkpoint")
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten: choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*checkpoint.OWN_FILES, MANIFEST))
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from None
    return out
