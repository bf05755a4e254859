"""Runs a plan: its runs in order, each in a run folder of its own, so that a killed plan goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from protos.errors import TeacherError
from student_trainer.config import TrainConfig
from student_trainer.config.recipe import RecipeStage, last_checkpoint
from student_trainer.distributed import by_main
from student_trainer.loop import train
from student_trainer.run_folder import RunFolder
from student_trainer.teacher_identity import TEACHER_FILE
from student_trainer.teacher_weights import send_checkpoint


class StageFailed(ValueError):
    """A stage of a recipe could not be run; the message names it and says why."""


def run_plan(plan: Sequence[RecipeStage], *, quiet: bool = False) -> Iterator[tuple[TrainConfig, Path]]:
    """Each run's config and last checkpoint as it is done; a finished run is passed over, an unfinished one goes on.

    A teacher that takes its weights from an earlier run is sent them each time before the stage begins or goes on: its
    server may have been started anew, or sent others, since.

    Raises:
        StageFailed: a stage of several failed.
        ConfigError, TeacherError, FloatingPointError: the only run failed; see `loop.train`.
    """
    for stage in plan:
        with _named(stage.name if len(plan) > 1 else None):
            is_finished = by_main(partial(_is_finished, stage.config))
            if stage.teacher_weights is not None and not is_finished:
                assert stage.config.teacher is not None
                by_main(partial(send_checkpoint, stage.config.teacher, stage.teacher_weights))
                # What the run noted of its teacher names the version sent before; these are the same weights.
                (Path(stage.config.run) / TEACHER_FILE).unlink(missing_ok=True)
            done = last_checkpoint(stage.config) if is_finished else train(stage.config, quiet=quiet)
        yield stage.config, done


def _is_finished(config: TrainConfig) -> bool:
    return RunFolder(config).intact_checkpoint() == last_checkpoint(config)


@contextmanager
def _named(stage: str | None) -> Iterator[None]:
    try:
        yield
    except (TeacherError, ValueError, FloatingPointError) as error:
        if stage is None:
            raise
        raise StageFailed(f"stage {stage}: {error}") from error
