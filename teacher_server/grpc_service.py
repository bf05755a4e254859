"""The gRPC face of the gate: bytes to records and back, errors to status codes; no rule of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from typing import NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import codec
from protos.errors import EngineFailed, TeacherError
from protos.wire import (
    AUTHORIZATION,
    BODY_CRC_HEADER,
    CLIENT_HEADER,
    ERROR_METADATA_KEY,
    GENERATE,
    GET_INFO,
    GRPC_LIMITS,
    GRPC_SERVICE,
    SCORE,
    check_body,
)
from teacher_server import auth
from teacher_server.gate import Gate
from teacher_server.limits import Limits
from teacher_server.observation import Observe, current, phase
from teacher_server.observers import ObservingInterceptor
from teacher_server.upload import read_out, read_upload

HEALTH_NAMES = ("", GRPC_SERVICE)

_CALLER: ContextVar[auth.Caller] = ContextVar("caller")
"""Set by the guard for the call's own task, in which its method then runs."""

_log = structlog.get_logger()


class GrpcListener:
    """A grpc.aio server over `gate`, with health and reflection; not started."""

    def __init__(self, gate: Gate, access: auth.Access, limits: Limits, observe: Observe) -> None:
        options = dict(GRPC_LIMITS) | {
            "grpc.max_receive_message_length": limits.max_message_bytes,
            # Without this two servers may share a port, and a port in use would not be noticed.
            "grpc.so_reuseport": 0,
        }
        interceptors = (ObservingInterceptor(observe), _Guard(access))
        self.server = grpc.aio.server(options=tuple(options.items()), interceptors=interceptors)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection((GRPC_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        self.server.add_generic_rpc_handlers((_Methods(gate).handler(),))

    async def set_ready(self, ready: bool) -> None:
        """What the health service answers from now on."""
        serving = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_NAMES:
            await self._health.set(name, serving)


class _Methods:
    """The methods over serialised messages; the codec refuses broken ones as it does over HTTP."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            GRPC_SERVICE,
            {
                GET_INFO.grpc_method: grpc.unary_unary_rpc_method_handler(self.get_info),
                SCORE.grpc_method: grpc.unary_stream_rpc_method_handler(self.score),
                GENERATE.grpc_method: grpc.unary_stream_rpc_method_handler(self.generate),
                "UpdateWeights": grpc.stream_unary_rpc_method_handler(self.update_weights),
                "UnloadTeacher": grpc.unary_unary_rpc_method_handler(self.unload),
            },
        )

    async def get_info(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return codec.encode_info(await self._gate.info())
        except Exception as error:
            await _abort(context, error)

    async def score(self, body: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        try:
            client = _client(context, auth.SCORE)
            _check(body, context)
            request = codec.decode_score_request(body)
            stream = self._gate.score_stream(request, timeout_s=context.time_remaining(), client=client)
            async with aclosing(stream) as replies:
                async for index, outcome in replies:
                    with phase("encode"):
                        reply = codec.encode_score_reply(index, outcome)
                    yield reply
        except Exception as error:
            await _abort(context, error)

    async def generate(self, body: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        try:
            client = _client(context, auth.GENERATE)
            _check(body, context)
            request = codec.decode_generate_request(body)
            stream = self._gate.generate_stream(request, timeout_s=context.time_remaining(), client=client)
            async with aclosing(stream) as replies:
                async for index, outcome in replies:
                    with phase("encode"):
                        reply = codec.encode_generate_reply(index, outcome)
                    yield reply
        except Exception as error:
            await _abort(context, error)

    async def update_weights(self, messages: AsyncIterable[bytes], context: grpc.aio.ServicerContext) -> bytes:
        try:
            _client(context, auth.ADMIN)
            update, chunks = await read_upload(messages)
            served = await self._gate.update_weights(update, chunks, timeout_s=context.time_remaining())
            return codec.encode_updated(served)
        except Exception as error:
            await read_out(messages)
            await _abort(context, error)

    async def unload(self, body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            _client(context, auth.ADMIN)
            _check(body, context)
            teacher = codec.decode_unload(body)
            return codec.encode_unloaded(await self._gate.unload(teacher, timeout_s=context.time_remaining()))
        except Exception as error:
            await _abort(context, error)


def _check(body: bytes, context: grpc.aio.ServicerContext) -> None:
    """Raises Corrupted unless the body is the one that was sent."""
    crc = _values(context.invocation_metadata(), BODY_CRC_HEADER)
    check_body(body, crc[0] if crc else None)


class _Guard(grpc.aio.ServerInterceptor):
    """Lets a call through with its Caller, or refuses it before its message is read; health is open to all."""

    def __init__(self, access: auth.Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.aio.ServerInterceptor."""
        if not handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            try:
                _CALLER.set(self._access.caller(_values(handler_call_details.invocation_metadata, AUTHORIZATION)))
            except TeacherError as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: TeacherError) -> grpc.RpcMethodHandler:
    """A method of streams, whatever the one called: it asks for no message before it answers."""

    async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _client(context: grpc.aio.ServicerContext, scope: str) -> str:
    """The name of the caller, which has this scope."""
    caller = _CALLER.get()
    caller.require(scope)
    client_id = ",".join(_values(context.invocation_metadata(), CLIENT_HEADER))
    return caller.client(client_id, _host(context.peer()))


def _values(metadata: Iterable[tuple[str, str | bytes]] | None, key: str) -> list[str]:
    return [value for name, value in metadata or () if name == key and isinstance(value, str)]


def _host(peer: str) -> str:
    """The address in gRPC's name of a peer: "ipv4:10.0.0.7:51234" or "ipv6:%5B::1%5D:51234", the port left out."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


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
