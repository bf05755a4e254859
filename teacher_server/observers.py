"""An Observation around every request of both listeners: taken or made request ids, sent back and counted alike."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos.wire import GENERATE, GRPC_SERVICE, REQUEST_ID_HEADER, SCORE
from teacher_server.observation import Observation, Observe, begin

_HTTP_OPERATIONS = {
    (SCORE.http_method, SCORE.http_path): "score",
    (GENERATE.http_method, GENERATE.http_path): "generate",
    ("POST", "/v1/completions"): "openai_completions",
    ("POST", "/v1/chat/completions"): "openai_chat",
}
_GRPC_OPERATIONS = {
    f"/{GRPC_SERVICE}/{SCORE.grpc_method}": "score",
    f"/{GRPC_SERVICE}/{GENERATE.grpc_method}": "generate",
}


class ObservedApp:
    """An ASGI application whose requests have ids, and whose operations are handed to `observe` at their end."""

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        observation = begin(_HTTP_OPERATIONS.get((scope["method"], scope["path"]), ""), headers)
        request_id = (REQUEST_ID_HEADER.encode(), observation.request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), request_id]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            observation.error = "Cancelled"
            raise
        finally:
            _end(observation, self._observe)


class ObservingInterceptor(grpc.aio.ServerInterceptor):
    """The same for gRPC: the id comes in metadata and goes back in initial metadata."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The call's handler, or what an interceptor behind this one answers in its place; observed if an operation."""
        metadata: Any = handler_call_details.invocation_metadata
        headers = {key: value for key, value in metadata or () if isinstance(value, str)}
        observation = begin(_GRPC_OPERATIONS.get(handler_call_details.method, ""), headers)
        handler: Any = await continuation(handler_call_details)
        if not observation.operation:
            return handler
        answer = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def observed(request: Any, context: grpc.aio.ServicerContext) -> None:
            try:
                await context.send_initial_metadata(((REQUEST_ID_HEADER, observation.request_id),))
                replies = answer(request, context)
                if not inspect.isasyncgen(replies):
                    await replies
                    return
                async with aclosing(replies):
                    async for reply in replies:
                        await context.write(reply)
            except asyncio.CancelledError:
                observation.error = "Cancelled"
                raise
            finally:
                _end(observation, self._observe)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(observed)
        return grpc.unary_stream_rpc_method_handler(observed)


def _end(observation: Observation, observe: Observe) -> None:
    if observation.operation:
        observation.finish()
        observe(observation)
