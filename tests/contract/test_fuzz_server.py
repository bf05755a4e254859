"""Whatever bytes come in, the answer is a result that holds what was asked, or an error of the table that blames the
caller; and nothing stays behind. In process through codec and core, and through both transports' sockets.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import numpy as np
import pytest
from hypothesis import strategies as st

from protos import codec, verify
from protos.errors import EngineFailed, TeacherError
from protos.records import GenerateItem, GenerateResult, ScoreItem, ScoreResult
from protos.wire import GENERATE, PROTOBUF_TYPE, SCORE, FrameReader, Operation
from teacher_server.admission import Admission
from teacher_server.core import TeacherCore
from teacher_server.engines.base import Engine
from teacher_server.teachers import Teachers
from teacher_server.tokenizer import ChatTokenizer
from tests.fuzz import GENERATE_REQUESTS, NUM_CASES, SCORE_REQUESTS, check_cases, damaged, spoilt
from tests.harness import LoopThread, Server, start_server

TIMEOUT_S = 5.0
"""Of one case; the largest work that passes validation here takes a tenth of it."""


@dataclass
class Target:
    """A core over the reference engine, served on both transports."""

    core: TeacherCore
    admission: Admission
    engine: Engine
    server: Server
    http: httpx.AsyncClient
    grpc: grpc.aio.Channel
    seen: Counter[str]

    def leftovers(self) -> tuple[int, int, int]:
        return self.admission.tokens_queued, self.admission.tokens_in_flight, self.engine.num_unfinished


@pytest.fixture
def target(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> Iterator[Target]:
    async def start() -> Target:
        admission = Admission(2**20, 2**22)
        tokenizer = ChatTokenizer.load(str(tiny_model))
        core = TeacherCore(transformers_engine, tokenizer, admission, teachers=Teachers(("base",)), max_items=64)
        server = await start_server(core)
        http = httpx.AsyncClient(base_url=server.listeners.http_url, timeout=TIMEOUT_S * 2)
        channel = grpc.aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://"))
        return Target(core, admission, transformers_engine, server, http, channel, Counter())

    async def stop(target: Target) -> None:
        await target.http.aclose()
        await target.grpc.close()
        await target.server.stop()
        target.core.close()

    target = run(start())
    yield target
    assert target.leftovers() == (0, 0, 0)
    run(stop(target))


def test_ten_thousand_cases_in_all() -> None:
    assert sum(NUM_CASES.values()) >= 10_000


def assert_sound(item: ScoreItem | GenerateItem, outcome: ScoreResult | GenerateResult | TeacherError) -> None:
    """The outcome is what was asked for, with log-probs that are log-probs, or an error that is not the engine's."""
    if isinstance(outcome, TeacherError):
        assert not isinstance(outcome, EngineFailed), outcome
        return
    if isinstance(item, ScoreItem):
        assert isinstance(outcome, ScoreResult)
        verify.check_score(item, outcome)
        arrays = [outcome.sampled_logprobs, outcome.top_logprobs]
        if item.candidate_ids is not None:
            is_asked_TM = np.broadcast_to(item.candidate_ids >= 0, outcome.candidate_logprobs.shape)
            arrays.append(outcome.candidate_logprobs[is_asked_TM])
    else:
        assert isinstance(outcome, GenerateResult)
        verify.check_generation(item, outcome)
        arrays = [sample.logprobs for sample in outcome.samples]
    for array in arrays:
        assert (array <= 1e-5).all(), array  # which NaN is not


async def answers(target: Target, operation: Operation, body: bytes) -> None:
    """Codec and core, as both listeners use them."""
    try:
        if operation is SCORE:
            request = codec.decode_score_request(body)
            stream = target.core.score_stream(request, timeout_s=TIMEOUT_S)
            encode: Callable[..., bytes] = codec.encode_score_reply
        else:
            request = codec.decode_generate_request(body)
            stream = target.core.generate_stream(request, timeout_s=TIMEOUT_S)
            encode = codec.encode_generate_reply
        async with asyncio.timeout(TIMEOUT_S * 2), aclosing(stream) as replies:
            async for index, outcome in replies:
                assert_sound(request.items[index], outcome)
                encode(index, outcome)
                target.seen[type(outcome).__name__] += 1
    except EngineFailed:
        raise  # blames the engine for what a stranger sent
    except TeacherError as error:
        codec.encode_error(error)
        target.seen[error.name] += 1


@pytest.mark.parametrize(
    ("name", "operation", "requests"),
    [
        ("score messages", SCORE, spoilt(SCORE_REQUESTS)),
        ("generate messages", GENERATE, spoilt(GENERATE_REQUESTS)),
        ("damaged bytes", SCORE, damaged(SCORE_REQUESTS.map(lambda message: message.SerializeToString()))),
    ],
)
def test_hostile_messages_in_process(
    run: LoopThread, target: Target, name: str, operation: Operation, requests: st.SearchStrategy[bytes]
) -> None:
    check_cases(NUM_CASES[name], requests, lambda body: run(answers(target, operation, body)))
    # The cases were neither all refused nor all accepted.
    assert target.seen["InvalidRequest"] > NUM_CASES[name] / 20
    assert target.seen["ScoreResult"] + target.seen["GenerateResult"] > NUM_CASES[name] / 20


async def over_http(target: Target, operation: Operation, body: bytes) -> None:
    headers = {"content-type": PROTOBUF_TYPE, "accept": PROTOBUF_TYPE, "x-timeout-s": str(TIMEOUT_S)}
    answer = await target.http.post(operation.http_path, content=body, headers=headers)
    if answer.status_code != httpx.codes.OK:
        error = codec.decode_error(answer.content)
        assert (error.row.http_status, error.name) == (answer.status_code, error.name)
        assert answer.status_code < 500, error
        target.seen[error.name] += 1
        return
    reader = FrameReader()
    decode = codec.decode_score_reply if operation is SCORE else codec.decode_generate_reply
    for reply in reader.feed(answer.content):
        _, outcome = decode(reply)
        assert not isinstance(outcome, EngineFailed)
        target.seen[type(outcome).__name__] += 1
    reader.finish()


async def over_grpc(target: Target, operation: Operation, body: bytes) -> None:
    call = target.grpc.unary_stream(f"/teacher.v1.TeacherService/{operation.grpc_method}")
    decode = codec.decode_score_reply if operation is SCORE else codec.decode_generate_reply
    try:
        async for reply in call(body, timeout=TIMEOUT_S):
            _, outcome = decode(reply)
            assert not isinstance(outcome, EngineFailed)
            target.seen[type(outcome).__name__] += 1
    except grpc.aio.AioRpcError as error:
        code = error.code()
    else:
        return
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
    target.seen[code.name] += 1


STRANGE = st.one_of(
    [
        st.tuples(st.just(operation), bodies)
        for operation, requests in ((SCORE, SCORE_REQUESTS), (GENERATE, GENERATE_REQUESTS))
        for bodies in (spoilt(requests), damaged(spoilt(requests)), st.binary(max_size=64))
    ]
)


def test_hostile_bytes_through_sockets(run: LoopThread, target: Target) -> None:
    """Each body goes through both transports, and counts twice."""

    async def both(operation: Operation, body: bytes) -> None:
        await over_http(target, operation, body)
        await over_grpc(target, operation, body)

    check_cases(NUM_CASES["sockets"] // 2, STRANGE, lambda drawn: run(both(*drawn)))
    assert min(target.seen["ScoreResult"], target.seen["GenerateResult"]) > NUM_CASES["sockets"] / 100
    # Both transports refuse the same.
    assert target.seen["InvalidRequest"] == target.seen["INVALID_ARGUMENT"] > NUM_CASES["sockets"] / 10
    [reply] = run(score_once(target))
    assert reply.num_tokens == 1


async def score_once(target: Target) -> list[ScoreResult]:
    async with target.server.connect("grpc") as teacher:
        one = np.array([1], np.int32)
        return await teacher.score([ScoreItem(one, one)])
