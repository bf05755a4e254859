"""The README's Python against a live teacher; the update of weights is in test_weights.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.harness import LoopThread, Server
from tests.readme import python_blocks, run_block

URL = "grpc://127.0.0.1:8001"


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_asking_a_teacher_directly(run: LoopThread, transformers_server: Server, scheme: str) -> None:
    asking, _ = python_blocks()
    assert URL in asking
    block = asking.replace(URL, transformers_server.url(scheme))
    left = run(run_block(block, completion_ids=np.array([52, 50, 258], np.int32)))
    assert left["info"].teachers == ("base", "same")
    assert left["result"].sampled_logprobs.shape == (3,)
    assert left["result"].top_ids.shape == (3, 20)
