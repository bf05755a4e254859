"""`docker/compose.yaml` on a real engine, as a project of its own: containers, their files, their metrics."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "opd-compose-test"
POLL_S = 2.0

_ASK = """
import os, urllib.request as r
request = r.Request("http://127.0.0.1:8000/metrics", headers={"authorization": "Bearer " + os.environ["TOKEN"]})
print(r.urlopen(request, timeout=60).read().decode())
"""
"""Runs inside a teacher's container: no port is open to the host."""

_ITEMS = re.compile(r'^teacher_items_total\{operation="score"\} (\S+)$', re.MULTILINE)
_FAILED = re.compile(r'^teacher_failed_items_total\{.*operation="score".*\} (\S+)$', re.MULTILINE)


def compose(*args: str) -> None:
    """Compose v2 where there is one, else docker-compose; CalledProcessError when it fails."""
    v2 = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    program = ["docker", "compose"] if v2 else ["docker-compose"]
    subprocess.run([*program, "-p", PROJECT, "-f", str(ROOT / "docker/compose.yaml"), *args], check=True)


def docker(*args: str, text_in: str | None = None, env: dict[str, str] | None = None) -> str:
    """The output of a docker command; CalledProcessError when it fails."""
    return subprocess.run(
        ["docker", *args], check=True, capture_output=True, text=True, input=text_in, env={**os.environ, **(env or {})}
    ).stdout.strip()


def containers(service: str | None = None) -> list[str]:
    """The ids of a service's containers, or of all, running or not, oldest first."""
    filters = ["--filter", f"label=com.docker.compose.project={PROJECT}"]
    if service is not None:
        filters += ["--filter", f"label=com.docker.compose.service={service}"]
    return list(reversed(docker("ps", "-aq", "--no-trunc", *filters).split()))


def inspect(container: str) -> dict[str, Any]:
    """What the engine knows of a container."""
    return json.loads(docker("inspect", container))[0]


def read(container: str, path: str) -> str:
    """A file of a container, running or not; "" where there is none yet."""
    result = subprocess.run(["docker", "cp", f"{container}:{path}", "-"], capture_output=True, check=False)
    if result.returncode:
        return ""
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
        file = archive.extractfile(archive.getmembers()[0])
        assert file is not None, f"{path} is a folder"
        return file.read().decode()


def rows(container: str, path: str) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file."""
    return [json.loads(line) for line in read(container, path).splitlines(keepends=True) if line.endswith("\n")]


def scored(teacher: str, token: str) -> tuple[float, float]:
    """How many items a replica was asked to score, and how many of them failed."""
    text = docker("exec", "-e", "TOKEN", teacher, "python", "-c", _ASK, env={"TOKEN": token})
    return sum(map(float, _ITEMS.findall(text))), sum(map(float, _FAILED.findall(text)))


def wait_for(what: str, is_so: Callable[[], bool], timeout_s: float) -> None:
    """Polls; AssertionError with the services' states when it takes longer."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s; {states()}"
        time.sleep(POLL_S)


def states(ids: Sequence[str] | None = None) -> dict[str, str]:
    """Each container's name, and its state with its exit code."""
    found = [inspect(container) for container in ids or containers()]
    return {one["Name"].strip("/"): f"{one['State']['Status']} {one['State']['ExitCode']}" for one in found}
