"""A `teacher-server` as a process of its own, and the processes below it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.harness import ROOT

PROGRAM = [sys.executable, "-m", "teacher_server"]
START_S = 240.0
"""A start takes 10 to 60 s where the machine is free; this is when to give up on a busy one."""

_NAMES = {"spawn_main", "EngineCore"}
ANY_PORTS = ("--http-port", "0", "--grpc-port", "0")
TINY_TRANSFORMERS = ("--engine", "transformers", "--threads", "1", *ANY_PORTS)
TINY_VLLM = ("--engine", "vllm", "--threads", "1", "--kv-cache-gib", "0.25", "--dtype", "float32", *ANY_PORTS)
"""Flags of a server over the tiny model."""

STOP_S = 60.0


class ServerProcess:
    """A teacher-server process, ready unless told not to wait; a context manager that kills what is left of it.

    Attributes:
        process: the process itself.
        log: the file that its stderr goes to.
        ready: what its ready file says: {http_url, grpc_url, pid}.
    """

    def __init__(self, model: Path, folder: Path, *args: str, wait: bool = True) -> None:
        ready = folder / "ready.json"
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, "serve", "--model", str(model), "--ready-file", str(ready), *args], cwd=ROOT, stderr=log
            )
        self.ready: dict[str, str] = {}
        if wait:
            try:
                self._wait_for(ready)
            except BaseException:
                self.kill()
                raise

    def engines(self) -> list[psutil.Process]:
        """vLLM's engine process, from the moment it is spawned and before it has named itself; none that has ended."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a zombie is none either
                if _NAMES & set(re.findall(r"\w+", " ".join(child.cmdline()))):
                    found.append(child)
        return found

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Ends it by that signal; fails where it does not drain and end with 0."""
        self.process.send_signal(signum)
        assert self.process.wait(STOP_S) == 0, self.log.read_text()

    def kill(self) -> None:
        """Kills the server and its engine, whatever is left of them."""
        left = [psutil.Process(self.process.pid), *self.engines()] if self.process.poll() is None else []
        for process in left:
            process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def _wait_for(self, ready: Path) -> None:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.ready = json.loads(ready.read_text())
