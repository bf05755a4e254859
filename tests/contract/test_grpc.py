"""gRPC as other programs use it: stock stubs, reflection, and one clear error for broken bytes."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import codec
from protos.errors import InvalidRequest
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1 import teacher_pb2_grpc
from protos.wire import BODY_CRC_HEADER, ERROR_METADATA_KEY, body_crc
from tests.harness import LoopThread, Server


def channel(server: Server) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://"))


def test_the_generated_stub_is_served(run: LoopThread, transformers_server: Server) -> None:
    async def scenario() -> tuple[pb.GetInfoResponse, list[pb.ScoreResponse]]:
        async with channel(transformers_server) as opened:
            stub: Any = teacher_pb2_grpc.TeacherServiceStub(opened)  # pyright: ignore[reportArgumentType]
            ids = np.array([1, 2], "<i4").tobytes()
            item = pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ids), completion_ids=ids, temperature=1.0)
            replies = [reply async for reply in stub.Score(pb.ScoreRequest(items=[item]))]
            return await stub.GetInfo(pb.GetInfoRequest()), replies

    info, [reply] = run(scenario())
    assert list(info.teachers) == ["base", "same"]
    assert len(reply.result.sampled_logprobs) == 8  # two float32


def test_reflection_lists_the_service(run: LoopThread, transformers_server: Server) -> None:
    async def scenario() -> set[str]:
        async with channel(transformers_server) as opened:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(opened)  # pyright: ignore[reportArgumentType]
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await call.done_writing()
            answer = await call.read()
            return {service.name for service in answer.list_services_response.service}

    assert {"teacher.v1.TeacherService", "grpc.health.v1.Health"} <= run(scenario())


@pytest.mark.parametrize("method", ["Score", "Generate"])
def test_a_request_damaged_on_its_way_is_not_scored(run: LoopThread, transformers_server: Server, method: str) -> None:
    async def scenario() -> grpc.aio.AioRpcError:
        async with channel(transformers_server) as opened:
            call = opened.unary_stream(f"/teacher.v1.TeacherService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [reply async for reply in call(b"damaged", metadata=((BODY_CRC_HEADER, body_crc(b"as sent")),))]
            return caught.value

    error = run(scenario())
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "damaged on its way" in (error.details() or "")


@pytest.mark.parametrize("method", ["Score", "Generate"])
def test_broken_bytes_are_an_invalid_request(run: LoopThread, transformers_server: Server, method: str) -> None:
    async def scenario() -> grpc.aio.AioRpcError:
        async with channel(transformers_server) as opened:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [reply async for reply in opened.unary_stream(f"/teacher.v1.TeacherService/{method}")(b"\xff\xff")]
            return caught.value

    error = run(scenario())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [body] = [value for key, value in error.trailing_metadata() or () if key == ERROR_METADATA_KEY]
    assert isinstance(body, bytes)
    rebuilt = codec.decode_error(body)
    assert isinstance(rebuilt, InvalidRequest)
    assert f"not a protobuf {method}Request" in rebuilt.message
