"""A `teacher-server` as a process of its own, and the processes below it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import psutil

from tests.harness import ROOT

PROGRAM = [sys.executable, "-m", "teacher_server"]
START_S = 240.0
"""A start takes 10 to 60 s where the machine is free; this is when to give up on a busy one."""

_NAMES = {"spawn_main", "EngineCore"}
ANY_PORTS = ("--http-port", "0", "--grpc-port", "0")
TINY_VLLM = ("--engine", "vllm", "--threads", "1", "--kv-cache-gib", "0.25", "--dtype", "float32", *ANY_PORTS)
"""Flags of a vLLM server over the tiny model."""


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
        """vLLM's engine process, from the moment it is spawned and before it has named itself."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if _NAMES & set(re.findall(r"\w+", " ".join(child.cmdline())))]

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
