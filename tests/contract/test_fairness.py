"""Two clients at one server, over real sockets: the small one does not wait for the large one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import structlog
from grpc import aio

from protos import codec
from protos.errors import DeadlineExceeded, Overloaded
from protos.records import ScoreItem, ScoreRequest
from protos.wire import PROTOBUF_TYPE
from teacher_server.admission import Admission
from teacher_server.auth import SCORE, Access, Token, sha256_of
from teacher_server.engines.base import Engine, ScoreRows, ScoreTask
from tests.harness import HeldEngine, LoopThread, Server, core_over, serving, until

LARGE, SMALL = "large-0123456789abcdef", "small-0123456789abcdef"
ACCESS = Access(
    (Token("large", sha256_of(LARGE), frozenset({SCORE})), Token("small", sha256_of(SMALL), frozenset({SCORE})))
)
ITEM = ScoreItem(np.arange(120, dtype=np.int32), np.arange(8, dtype=np.int32))
"""128 tokens."""


def test_one_item_overtakes_another_client_s_many(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> list[int]:
        held, admission = Recording(transformers_engine), Admission(128, 2**20)  # one item at a time
        core = core_over(held, tiny_model, admission=admission)
        async with (
            serving(core, access=ACCESS) as server,
            server.connect(scheme, token=LARGE) as large,
            server.connect(scheme, token=SMALL) as small,
        ):
            asking_large = asyncio.create_task(large.score([ITEM] * 64))
            await until(lambda: admission.tokens_queued == 63 * 128)
            asking_small = asyncio.create_task(small.score([ScoreItem(ITEM.prompt, ITEM.completion_ids[:1])]))
            await until(lambda: admission.tokens_queued == 63 * 128 + 121)
            held.door.set()
            await asyncio.gather(asking_small, asking_large)
            return held.completion_lengths

    # The item that was running ends, and then it is the small client's.
    assert run(scenario()) == [8] + [1] + [8] * 63


@dataclass
class Recording(HeldEngine):
    """A held engine that notes the length of each completion as its work begins."""

    completion_lengths: list[int] = field(default_factory=list)

    async def score(self, task: ScoreTask) -> ScoreRows:
        self.completion_lengths.append(len(task.completion_ids))
        return await super().score(task)


def test_a_client_that_fills_its_share_leaves_room_for_another(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        held, admission = HeldEngine(transformers_engine), Admission(128, 8 * 128)
        core = core_over(held, tiny_model, admission=admission)
        async with (
            serving(core, access=ACCESS) as server,
            server.connect(scheme, token=LARGE) as large,
            server.connect(scheme, token=SMALL) as small,
        ):
            asking = [asyncio.create_task(large.score([ITEM] * 5))]  # one runs and four wait: half the queue
            await until(lambda: admission.tokens_queued == 4 * 128)
            with pytest.raises(Overloaded, match=r"512 tokens wait \(512 of this client\) and this request has 128"):
                await large.score([ITEM])
            asking.append(asyncio.create_task(small.score([ITEM])))
            await until(lambda: admission.tokens_queued == 5 * 128)
            # A deadline that passes in the queue frees the place.
            with pytest.raises(DeadlineExceeded):
                await small.score([ITEM], timeout_s=0.3)
            await until(lambda: admission.tokens_queued == 5 * 128)
            held.door.set()
            await asyncio.gather(*asking)
            assert admission.tokens_in_flight == admission.tokens_queued == 0

    run(scenario())


def test_a_client_without_a_token_is_known_by_what_it_says_or_by_its_address(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        async with serving(core_over(transformers_engine, tiny_model)) as server:
            for client_id in ("", "me"):
                await over_http(server, client_id)
                await over_grpc(server, client_id)

    with structlog.testing.capture_logs() as lines:
        run(scenario())
    clients = [line["client"] for line in lines if line["event"] == "request"]
    assert clients == ["127.0.0.1", "127.0.0.1", "me", "me"]


BODY = codec.encode_score_request(ScoreRequest((ITEM,)))


async def over_http(server: Server, client_id: str) -> None:
    headers = {"content-type": PROTOBUF_TYPE} | ({"x-client-id": client_id} if client_id else {})
    async with httpx.AsyncClient(base_url=server.listeners.http_url) as client:
        (await client.post("/v1/score", content=BODY, headers=headers)).raise_for_status()


async def over_grpc(server: Server, client_id: str) -> None:
    metadata = (("x-client-id", client_id),) if client_id else ()
    async with aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://")) as channel:
        _ = [r async for r in channel.unary_stream("/teacher.v1.TeacherService/Score")(BODY, metadata=metadata)]
