"""A teacher server as its own process, for the demos: started, waited for, and always ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 240.0
"""vLLM's own start-up on a CPU takes up to a minute; a busy machine several."""

POLL_S = 0.2


@dataclass(frozen=True)
class TeacherProcess:
    """A server that may still be loading; `wait` before the URLs are used."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path

    def wait(self) -> dict[str, str]:
        """Blocks until the server is ready; returns its `grpc_url` and `http_url`.

        Raises:
            RuntimeError: it ended or took longer than START_TIMEOUT_S.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.ready_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the teacher server did not start; its log is {self.log}")
            time.sleep(POLL_S)
        return json.loads(self.ready_file.read_text())


@contextmanager
def teacher_process(model: Path, folder: Path, *, engine: str = "vllm", threads: int = 1) -> Iterator[TeacherProcess]:
    """Serves `model` on free ports; log and ready file go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log = folder / "ready.json", folder / "server.log"
    ready_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "teacher_server", "serve", "--model", str(model), "--engine", engine]
    command += ["--http-port", "0", "--grpc-port", "0", "--ready-file", str(ready_file), "--threads", str(threads)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        yield TeacherProcess(process, ready_file, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
