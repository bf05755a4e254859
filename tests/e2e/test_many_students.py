"""Eight student processes on a pool of three replicas, in little; `make bench` has the long version over vLLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from teacher_server.admission import Admission
from teacher_server.auth import SCORE, Access, Token, sha256_of
from teacher_server.engines.base import Engine
from tests.harness import LoopThread, core_over, serving
from tests.load import NUM_COMPLETION, NUM_ITEMS, NUM_PROMPT, Outcome, jain, run_students, write_texts

pytestmark = pytest.mark.slow

NAMES = [f"student-{index}" for index in range(8)]
TOKENS = {name: f"{name}-0123456789abcdef" for name in NAMES}
ACCESS = Access(tuple(Token(name, sha256_of(token), frozenset({SCORE})) for name, token in TOKENS.items()))

REQUEST_TOKENS = NUM_ITEMS * (NUM_PROMPT + NUM_COMPLETION)
SECONDS = 4.0


@asynccontextmanager
async def replicas(engine: Engine, model: Path) -> AsyncGenerator[str, None]:
    """The URL of three servers that each work on one request at a time, so that the queue decides who is next."""
    async with AsyncExitStack() as stack:
        urls = []
        for _ in range(3):
            core = core_over(engine, model, admission=Admission(REQUEST_TOKENS, 2**20))
            urls.append((await stack.enter_async_context(serving(core, access=ACCESS))).url("grpc"))
        yield ",".join(urls)


def test_students_share_a_pool_fairly_and_a_greedy_one_starves_nobody(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    with run.entered(replicas(transformers_engine, tiny_model)) as url:
        run(write_texts(url, tmp_path, TOKENS))

        def items(num_in_flight: Mapping[str, int]) -> dict[str, Outcome]:
            return run_students(url, tmp_path, num_in_flight, SECONDS, tokens=TOKENS)

        equal = [outcome.num_items for outcome in items(dict.fromkeys(NAMES, 4)).values()]
        greedy = items({name: 32 if name == NAMES[0] else 4 for name in NAMES})
    assert jain(equal) >= 0.95, equal
    others = [outcome.num_items for name, outcome in greedy.items() if name != NAMES[0]]
    assert jain(others) >= 0.95, others
    # It has 32 of 60 requests: first come, first served would leave the others 28/60 of the work, 0.53 of their share.
    share = sum(others) / sum(outcome.num_items for outcome in greedy.values())
    assert share >= 0.9 * 7 / 8, greedy
