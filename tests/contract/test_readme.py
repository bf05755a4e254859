"""The README's Python, run as it stands against a live teacher."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import numpy as np
import pytest

from tests.harness import ROOT, LoopThread, Server

BLOCK = re.compile(r"(?:^ {4}.*\n|^\n)+", re.MULTILINE)
URL = "grpc://127.0.0.1:8001"


def python_blocks() -> list[str]:
    """The README's indented blocks that import the contract."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    return [textwrap.dedent(block) for block in blocks if "from protos" in block]


def test_there_are_blocks_to_run() -> None:
    assert len(python_blocks()) == 1
    assert all(URL in block for block in python_blocks())


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_asking_a_teacher_directly(run: LoopThread, transformers_server: Server, scheme: str) -> None:
    (block,) = python_blocks()
    body = textwrap.indent(block.replace(URL, transformers_server.url(scheme)), "    ")
    completion_ids = np.array([52, 50, 258], np.int32)
    names: dict[str, Any] = {"completion_ids": completion_ids}
    exec(f"async def snippet():\n{body}\n    return info, result\n", names)
    info, result = run(names["snippet"]())
    assert info.model
    assert result.sampled_logprobs.shape == (3,)
    assert result.top_ids.shape == (3, 20)
