"""Whatever a server answers, the client hands on results of the asked shapes or raises a TeacherError: nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc.aio
import numpy as np
import pytest
from hypothesis import strategies as st

from protos import codec, verify
from protos.client import RemoteTeacher, Teacher, connect
from protos.errors import ERRORS, Corrupted, InvalidRequest, TeacherError
from protos.records import GenerateItem, GenerateResult, Sample, ScoreItem, ScoreResult, crc32_of
from protos.teacher.v1 import teacher_pb2 as pb
from protos.wire import ERROR_METADATA_KEY, GRPC_SERVICE, PROTOBUF_TYPE, SCORE, FrameReader, Operation, frame
from tests.fuzz import NUM_CASES, check_cases, damaged, spoilt
from tests.harness import LoopThread

IDS = np.array([1, 2], np.int32)
SCORE_ITEM = ScoreItem(IDS, IDS, top_k=2, candidate_ids=np.array([[3], [4]], np.int32), entropy=True)
GENERATE_ITEM = GenerateItem(IDS, max_new_tokens=2, num_samples=1)

LOGPROBS_T = np.array([-1.0, -2.0], np.float32)
LOGPROBS_TK = np.array([[-1.0, -2.0], [-1.5, -2.5]], np.float32)
SCORED = ScoreResult(
    LOGPROBS_T, IDS[None].repeat(2, 0), LOGPROBS_TK, LOGPROBS_TK[:, :1], LOGPROBS_T, 0, 2, 0, 0.0, 0.0, crc32_of(IDS)
)
WRITTEN = GenerateResult((Sample(IDS, LOGPROBS_T, "length", "ab"),), 0, 2, 0, 0.0, 0.0)
FAILED = ERRORS["Overloaded"]("full", field="items[0]", retry_after_s=1.0)

OUTCOMES = st.sampled_from([SCORED, FAILED])
REPLIES = {
    "score": OUTCOMES.map(lambda outcome: pb.ScoreResponse.FromString(codec.encode_score_reply(0, outcome))),
    "generate": st.just(WRITTEN).map(
        lambda outcome: pb.GenerateResponse.FromString(codec.encode_generate_reply(0, outcome))
    ),
}


@dataclass
class Canned:
    """A Transport that answers every operation with the same messages."""

    replies: list[bytes]
    url: str = "canned"

    async def stream(
        self, operation: Operation, request: bytes, *, timeout_s: float | None
    ) -> AsyncGenerator[bytes, None]:
        for reply in self.replies:
            yield reply

    async def upload(self, operation: Operation, requests: AsyncIterable[bytes], *, timeout_s: float | None) -> bytes:
        return self.replies[0]

    async def aclose(self) -> None:
        """Nothing is open."""


def test_wrong_replies_are_never_handed_on(run: LoopThread) -> None:
    seen: Counter[str] = Counter()

    async def ask(replies: list[bytes], operation: str) -> None:
        teacher = RemoteTeacher(Canned(replies))
        try:
            if operation == "score":
                [scored] = await teacher.score([SCORE_ITEM])
                verify.check_score(SCORE_ITEM, scored)
            else:
                [written] = await teacher.generate([GENERATE_ITEM])
                verify.check_generation(GENERATE_ITEM, written)
            seen["result"] += 1
        except TeacherError as error:
            seen[error.name] += 1

    for operation, replies in REPLIES.items():
        serialised = spoilt(replies) | damaged(replies.map(lambda message: message.SerializeToString()))
        check_cases(
            NUM_CASES["replies"] // 2,
            st.lists(serialised, min_size=1, max_size=2),
            lambda drawn, operation=operation: run(ask(drawn, operation)),
        )
    assert min(seen["result"], seen["Corrupted"], seen["Overloaded"]) > NUM_CASES["replies"] / 100


def test_a_damaged_info_is_corrupted(run: LoopThread) -> None:
    info = pb.GetInfoResponse(teachers=["base"], model="m", tokenizer=pb.TokenizerFingerprint(vocab_size=3))

    async def ask(reply: bytes) -> None:
        with contextlib.suppress(Corrupted):
            await RemoteTeacher(Canned([reply])).info()

    check_cases(200, spoilt(st.just(info)) | damaged(st.just(info.SerializeToString())), lambda reply: run(ask(reply)))


def test_a_damaged_stream_is_read_or_refused() -> None:
    messages = [b"", b"abc", b"x" * 300]

    def read(stream: bytes) -> None:
        reader = FrameReader()
        with contextlib.suppress(ValueError):
            for place in range(0, len(stream), 7):
                for message in reader.feed(stream[place : place + 7]):
                    assert len(message) <= len(stream)
            reader.finish()

    check_cases(300, damaged(st.just(b"".join(map(frame, messages)))), read)


ERROR_BODY = pb.Error(name="Conflict", message="m", field="f", retry_after_s=2.0)
ERROR_BODIES = spoilt(st.just(ERROR_BODY)) | damaged(st.just(ERROR_BODY.SerializeToString())) | st.binary(max_size=30)
STATUSES = [400, 401, 404, 409, 418, 422, 429, 500, 502, 503, 504]


@asynccontextmanager
async def http_server(answer: dict[str, bytes]) -> AsyncIterator[str]:
    """A server that gives every request the same bytes."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer["bytes"])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_a_damaged_error_body_is_corrupted(run: LoopThread) -> None:
    """Over HTTP, whatever the status."""

    async def case(teacher: Teacher, answer: dict[str, bytes], status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {PROTOBUF_TYPE}\r\ncontent-length: {len(body)}\r\n"
        answer["bytes"] = f"{head}connection: close\r\n\r\n".encode() + body
        with pytest.raises(TeacherError) as caught:
            await teacher.score([SCORE_ITEM], timeout_s=5.0)
        assert_as_sent(caught.value, body)

    answer: dict[str, bytes] = {}
    stack = AsyncExitStack()
    teacher = connect(run(stack.enter_async_context(http_server(answer))))
    check_cases(
        NUM_CASES["error bodies"] // 2,
        st.tuples(st.sampled_from(STATUSES), ERROR_BODIES),
        lambda drawn: run(case(teacher, answer, *drawn)),
    )
    run(teacher.aclose())
    run(stack.aclose())


def assert_as_sent(error: TeacherError, body: bytes) -> None:
    """The error in `body`, or Corrupted where there is none: the caller may ask again."""
    try:
        sent = codec.decode_error(body)
    except InvalidRequest:
        assert error.name == "Corrupted"
    else:
        assert (error.name, error.message) == (sent.name, sent.message)


def test_damaged_error_metadata_is_corrupted(run: LoopThread) -> None:
    """Over gRPC, whatever the code."""
    answer: dict[str, bytes] = {}

    async def fail(_: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "old", ((ERROR_METADATA_KEY, answer["bytes"]),))
        yield b""

    async def start() -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(fail)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(GRPC_SERVICE, {SCORE.grpc_method: handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"grpc://127.0.0.1:{port}"

    server, url = run(start())
    teacher = connect(url)

    async def case(body: bytes) -> None:
        answer["bytes"] = body
        with pytest.raises(TeacherError) as caught:
            await teacher.score([SCORE_ITEM], timeout_s=5.0)
        assert_as_sent(caught.value, body)

    check_cases(NUM_CASES["error bodies"] // 2, ERROR_BODIES, lambda body: run(case(body)))
    run(teacher.aclose())
    run(server.stop(0.0))
