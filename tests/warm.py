"""Processes that start in a second, of a trainer or of a teacher: forked from one that has imported what is slow."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from student_trainer.config import TrainConfig
from student_trainer.run_folder import read_rows

STEP_WITHIN_S = 240.0
"""From a start to any step that a test waits for; a hundredth of it where the machine is free."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["__main__", "student_trainer.loop", "protos._http", "tests.warm"])


def start(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """`work(*arguments)` as a process of its own, with this one's environment of now."""
    process = _CONTEXT.Process(target=_in_environment, args=(dict(os.environ), work, arguments))
    process.start()
    return process


def start_train(config: TrainConfig) -> ForkServerProcess:
    """`loop.train` as a process of its own."""
    return start(_train, config)


def start_command(config: Path) -> ForkServerProcess:
    """`student-trainer train CONFIG` as a process of its own."""
    return start(_command, "train", str(config))


def start_server(log: Path, *arguments: str) -> ForkServerProcess:
    """`teacher-server serve ARGUMENTS`, whose output is added to `log`."""
    return start(_serve, log, *arguments)


def last_step(run: Path) -> int:
    """The last whose metrics are on disk; -1 before the first."""
    metrics = run / "metrics.jsonl"
    rows = read_rows(metrics) if metrics.exists() else []
    return rows[-1]["step"] if rows else -1


def wait_for_step(process: ForkServerProcess, run: Path, step: int) -> None:
    """Until that step's metrics are on disk; fails where the process ends before."""
    deadline = time.monotonic() + STEP_WITHIN_S
    while last_step(run) < step:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_after_step(process: ForkServerProcess, run: Path, step: int) -> None:
    """SIGKILL as soon as that step's metrics are on disk."""
    try:
        wait_for_step(process, run, step)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def _in_environment(environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)


def _train(config: TrainConfig) -> None:
    from student_trainer.loop import train

    train(config, quiet=True)


def _command(*arguments: str) -> None:
    from student_trainer.cli import main

    sys.argv = ["student-trainer", *arguments]
    main()


def _serve(log: Path, *arguments: str) -> None:
    from teacher_server.cli import main

    with log.open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    sys.argv = ["teacher-server", "serve", *arguments]
    main()
