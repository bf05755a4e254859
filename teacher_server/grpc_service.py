"""The gRPC face of a TeacherService: bytes to records and back, errors to status codes; no rule of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NoReturn

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import codec
from protos.errors import EngineFailed, TeacherError
from protos.service import TeacherService
from protos.wire import ERROR_METADATA_KEY, GENERATE, GET_INFO, GRPC_LIMITS, GRPC_SERVICE, SCORE
from teacher_server.observation import Observe, current, phase
from teacher_server.observers import ObservingInterceptor

HEALTH_NAMES = ("", GRPC_SERVICE)

_OPTIONS = (
    *GRPC_LIMITS,
    # Without this two servers may share a port, and a port in use would not be noticed.
    ("grpc.so_reuseport", 0),
)

_log = structlog.get_logger()


class GrpcListener:
    """A grpc.aio server over `service`, with health and reflection; not started."""

    def __init__(self, service: TeacherService, observe: Observe) -> None:
        self.server = grpc.aio.server(interceptors=(ObservingInterceptor(observe),), options=_OPTIONS)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection((GRPC_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        self.server.add_generic_rpc_handlers((_Methods(service).handler(),))

    async def set_ready(self, ready: bool) -> None:
        """What the health service answers from now on."""
        serving = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_NAMES:
            await self._health.set(name, serving)


class _Methods:
    """The three methods over serialised messages; the codec refuses broken ones as it does over HTTP."""

    def __init__(self, service: TeacherService) -> None:
        self._service = service

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            GRPC_SERVICE,
            {
                GET_INFO.grpc_method: grpc.unary_unary_rpc_method_handler(self.get_info),
                SCORE.grpc_method: grpc.unary_stream_rpc_method_handler(self.score),
                GENERATE.grpc_method: grpc.unary_stream_rpc_method_handler(self.generate),
            },
        )

    async def get_info(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return codec.encode_info(await self._service.info())
        except Exception as error:
            await _abort(context, error)

    async def score(self, body: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        try:
            request = codec.decode_score_request(body)
            async with aclosing(self._service.score_stream(request, timeout_s=context.time_remaining())) as replies:
                async for index, outcome in replies:
                    with phase("encode"):
                        reply = codec.encode_score_reply(index, outcome)
                    yield reply
        except Exception as error:
            await _abort(context, error)

    async def generate(self, body: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        try:
            request = codec.decode_generate_request(body)
            async with aclosing(self._service.generate_stream(request, timeout_s=context.time_remaining())) as replies:
                async for index, outcome in replies:
                    with phase("encode"):
                        reply = codec.encode_generate_reply(index, outcome)
                    yield reply
        except Exception as error:
            await _abort(context, error)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """Ends the call with the error's row of the table and the error itself beside it."""
    if not isinstance(error, TeacherError):
        _log.error("unexpected failure", exc_info=error)
        error = EngineFailed(f"unexpected failure in the server: {type(error).__name__}")
    current().error = error.name
    await context.abort(
        grpc.StatusCode[error.row.grpc_code],
        str(error)[: codec.MAX_ERROR_CHARS],
        ((ERROR_METADATA_KEY, codec.encode_error(error)),),
    )
    raise AssertionError("abort returns never")
