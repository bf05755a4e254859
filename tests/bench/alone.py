"""A measurement in a fresh process of its own, whose memory nothing else has touched."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


def alone(work: Callable[[], T]) -> T:
    """The result of `work`, which must be picklable, as must its result; EOFError where the process died of it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(work, there))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _run(work: Callable[[], object], pipe: Connection) -> None:
    pipe.send(work())
