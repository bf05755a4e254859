"""Training processes that start in a second: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from student_trainer.config import TrainConfig

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["__main__", "student_trainer.loop", "protos._http", "tests.warm"])


def start(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """`work(*arguments)` as a process of its own."""
    process = _CONTEXT.Process(target=work, args=arguments)
    process.start()
    return process


def start_train(config: TrainConfig) -> ForkServerProcess:
    """`loop.train` as a process of its own."""
    return start(_train, config)


def start_command(config: Path) -> ForkServerProcess:
    """`student-trainer train CONFIG` as a process of its own."""
    return start(_command, "train", str(config))


def _train(config: TrainConfig) -> None:
    from student_trainer.loop import train

    train(config, quiet=True)


def _command(*arguments: str) -> None:
    from student_trainer.cli import main

    sys.argv = ["student-trainer", *arguments]
    main()
