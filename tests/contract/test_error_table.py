"""Every row of the error table crosses both transports unchanged, whole and in band."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest

from protos import codec
from protos.errors import ERRORS, Corrupted, EngineFailed, TeacherError
from protos.records import (
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    Sample,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    TeacherInfo,
    crc32_of,
)
from protos.service import GenerateStream, ScoreStream
from protos.wire import PROTOBUF_TYPE, SCORE
from tests.harness import LoopThread, serving
from tests.records import score_result

IDS = np.array([1, 2], np.int32)
REQUEST = ScoreRequest((ScoreItem(IDS, IDS), ScoreItem(IDS, IDS)))


@dataclass(frozen=True)
class Failing:
    """A TeacherService that raises `whole`, or answers item 0 and gives every other item `in_band`."""

    whole: Exception | None = None
    in_band: TeacherError | None = None

    async def info(self) -> TeacherInfo:
        raise self.whole or AssertionError("only a whole failure is asked for its info")

    async def score_stream(
        self, request: ScoreRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> ScoreStream:
        for index in self._indices(request):
            yield index, score_result(np.zeros(2), num_context_tokens=2, completion_crc32=crc32_of(IDS))
        for index in range(1, len(request.items)):
            assert self.in_band is not None
            yield index, self.in_band

    async def generate_stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> GenerateStream:
        for index in self._indices(request):
            yield index, GenerateResult((Sample(IDS, np.zeros(2, np.float32), "stop", ""),), 0, 2, 0, 0.0, 0.0)
        for index in range(1, len(request.items)):
            assert self.in_band is not None
            yield index, self.in_band

    def _indices(self, request: ScoreRequest | GenerateRequest) -> list[int]:
        if self.whole is not None:
            raise self.whole
        return [0]


def error_of(name: str) -> TeacherError:
    return ERRORS[name](f"{name} says: 3 > 2, Grüße", field="items[1].top_k", retry_after_s=2.5)


def parts(error: TeacherError) -> tuple[type, str, str, float | None]:
    return type(error), error.message, error.field, error.retry_after_s


@pytest.mark.parametrize("name", ERRORS)
def test_a_whole_failure_is_raised_as_it_was(run: LoopThread, scheme: str, name: str) -> None:
    async def scenario() -> None:
        error = error_of(name)
        async with serving(Failing(whole=error)) as server, server.connect(scheme) as teacher:
            for call in (
                teacher.info(),
                teacher.score(REQUEST),
                teacher.generate([GenerateItem(IDS, max_new_tokens=2)]),
            ):
                with pytest.raises(ERRORS[name]) as caught:
                    await call
                assert parts(caught.value) == parts(error)

    run(scenario())


@pytest.mark.parametrize("name", ERRORS)
def test_an_item_s_failure_comes_in_band(run: LoopThread, scheme: str, name: str) -> None:
    async def scenario() -> None:
        error = error_of(name)
        async with serving(Failing(in_band=error)) as server, server.connect(scheme) as teacher:
            outcomes = dict([reply async for reply in teacher.score_stream(REQUEST)])
            assert isinstance(outcomes[0], ScoreResult)
            assert isinstance(outcomes[1], TeacherError)
            assert parts(outcomes[1]) == parts(error)
            with pytest.raises(ERRORS[name]):
                await teacher.score(REQUEST)
            items = [GenerateItem(IDS, max_new_tokens=2)] * 2
            with pytest.raises(ERRORS[name]):
                await teacher.generate(items)

    run(scenario())


@pytest.mark.parametrize("name", ERRORS)
def test_statuses_are_those_of_the_table(run: LoopThread, name: str) -> None:
    async def scenario() -> None:
        async with serving(Failing(whole=error_of(name))) as server:
            body = codec.encode_score_request(REQUEST)
            async with httpx.AsyncClient(base_url=server.listeners.http_url) as client:
                for accept in (PROTOBUF_TYPE, "application/json"):
                    headers = {"content-type": PROTOBUF_TYPE, "accept": accept}
                    answer = await client.post(SCORE.http_path, content=body, headers=headers)
                    assert answer.status_code == ERRORS[name].row.http_status
                    assert answer.headers["retry-after"] == "3"  # whole seconds, rounded up from 2.5
                assert answer.json() == {
                    "error": {
                        "name": name,
                        "message": f"{name} says: 3 > 2, Grüße",
                        "field": "items[1].top_k",
                        "retry_after_s": 2.5,
                    }
                }
            async with grpc.aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://")) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    _ = [reply async for reply in channel.unary_stream("/teacher.v1.TeacherService/Score")(body)]
            assert caught.value.code().name == ERRORS[name].row.grpc_code

    run(scenario())


def test_an_unexpected_exception_is_an_engine_failure(run: LoopThread, scheme: str) -> None:
    async def scenario() -> TeacherError:
        async with serving(Failing(whole=RuntimeError("secret detail"))) as server, server.connect(scheme) as teacher:
            with pytest.raises(EngineFailed) as caught:
                await teacher.score(REQUEST)
            return caught.value

    assert run(scenario()).message == "unexpected failure in the server: RuntimeError"


def test_a_message_of_any_length_crosses(run: LoopThread, scheme: str) -> None:
    async def scenario() -> TeacherError:
        error = ERRORS["Conflict"]("ü" * 10_000)
        async with serving(Failing(whole=error)) as server, server.connect(scheme) as teacher:
            with pytest.raises(ERRORS["Conflict"]) as caught:
                await teacher.score(REQUEST)
            return caught.value

    assert run(scenario()).message == "ü" * codec.MAX_ERROR_CHARS


@dataclass(frozen=True)
class Wrong:
    """A TeacherService whose score replies are `replies`, right or wrong."""

    replies: tuple[tuple[int, ScoreResult | TeacherError], ...]

    async def info(self) -> TeacherInfo:
        raise EngineFailed("not asked for")

    async def score_stream(
        self, request: ScoreRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> ScoreStream:
        for reply in self.replies:
            yield reply

    async def generate_stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> AsyncGenerator[tuple[int, GenerateResult | TeacherError], None]:
        raise EngineFailed("not asked for")
        yield  # makes this a generator


def right_result(num_tokens: int = 2, crc32: int = crc32_of(IDS), num_top: int = 0) -> ScoreResult:
    top = np.zeros((num_tokens, num_top), np.float32)
    none = np.empty((num_tokens, 0), np.float32)
    logprobs = np.zeros(num_tokens, np.float32)
    return ScoreResult(logprobs, top.astype(np.int32), top, none, None, 0, 2, 0, 0.0, 0.0, crc32)


WRONG = {
    "missing": (((0, right_result()),), "no reply to items [1]"),
    "twice": (((0, right_result()), (0, right_result())), "came twice"),
    "unasked": (((2, right_result()),), "not asked for"),
    "length": (((0, right_result(num_tokens=3)),), "sampled_logprobs is (3,)"),
    "checksum": (((0, right_result(crc32=1)),), "completion_crc32 is 1"),
    "K": (((0, right_result(num_top=4)),), "top_ids is (2, 4)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_never_handed_on(run: LoopThread, scheme: str, case: str) -> None:
    replies, words = WRONG[case]

    async def scenario() -> None:
        async with serving(Wrong(replies)) as server, server.connect(scheme) as teacher:
            with pytest.raises(Corrupted) as caught:
                await teacher.score(REQUEST)
            assert words in caught.value.message

    run(scenario())
