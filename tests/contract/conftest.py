"""Fixtures of several files of the contract's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.doors import Scenario, over_doors
from tests.harness import LoopThread, Server


@pytest.fixture
def alone(run: LoopThread, transformers_server: Server) -> Callable[[Scenario], None]:
    """Runs a scenario over doors to a real server; see `over_doors`."""
    return lambda body: run(over_doors(transformers_server, body))
