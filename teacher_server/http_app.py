"""The HTTP face of the gate: bodies to records and back, errors to statuses; no rule of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from protos import codec, json_models
from protos.errors import (
    ERRORS,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    TeacherError,
    Unauthenticated,
    too_large,
)
from protos.records import ServedTeacher, TeacherInfo
from protos.wire import (
    AUTHORIZATION,
    BODY_CRC_HEADER,
    CLIENT_HEADER,
    GENERATE,
    GET_INFO,
    JSON_TYPE,
    PROTOBUF_TYPE,
    SCORE,
    TEACHER_PATH,
    TIMEOUT_HEADER,
    WEIGHTS_PATH,
    FrameReader,
    check_body,
    frame,
)
from teacher_server import auth, openai_routes
from teacher_server.gate import Gate
from teacher_server.limits import DEFAULT_LIMITS, Limits
from teacher_server.observation import current, phase
from teacher_server.upload import read_out, read_upload

_log = structlog.get_logger()
_INFO_JSON = TypeAdapter(TeacherInfo)

LIVENESS_PATHS = ("/healthz", "/readyz")
"""What answers without a token."""


@dataclass(frozen=True)
class _Form:
    """How one operation's requests and replies are written."""

    from_protobuf: Callable[[bytes], Any]
    to_protobuf: Callable[[int, Any], bytes]
    from_json: Callable[[bytes], Any]
    to_json: Callable[[int, Any], BaseModel]
    json_request: type[BaseModel]
    json_replies: Callable[..., BaseModel]


_SCORE = _Form(
    codec.decode_score_request,
    codec.encode_score_reply,
    json_models.score_request_from_json,
    json_models.score_reply_to_json,
    json_models.ScoreRequestJson,
    json_models.ScoreRepliesJson,
)
_GENERATE = _Form(
    codec.decode_generate_request,
    codec.encode_generate_reply,
    json_models.generate_request_from_json,
    json_models.generate_reply_to_json,
    json_models.GenerateRequestJson,
    json_models.GenerateRepliesJson,
)

_JSON_REQUESTS = (_SCORE.json_request, _GENERATE.json_request, json_models.WeightsUpdateJson)


def create_app(
    gate: Gate,
    metrics_text: Callable[[], bytes],
    access: auth.Access = auth.OPEN,
    limits: Limits = DEFAULT_LIMITS,
) -> FastAPI:
    """The ASGI application over `gate`; /readyz follows it, /healthz answers while the process lives."""
    app = FastAPI(title="teacher-server", description="Scores text it did not write, and continues it.")
    app.add_middleware(_Guard, access=access)

    @app.get(GET_INFO.http_path, response_model=TeacherInfo, responses=_error_responses())
    async def info(request: Request) -> Response:
        """What this teacher is: the handshake before any score is trusted."""
        teacher = await gate.info()
        if _speaks_protobuf(request):
            return Response(frame(codec.encode_info(teacher)), media_type=PROTOBUF_TYPE)
        return Response(_INFO_JSON.dump_json(teacher), media_type=JSON_TYPE)

    @app.post(
        SCORE.http_path,
        response_model=json_models.ScoreRepliesJson,
        responses=_error_responses(),
        openapi_extra=_request_body(_SCORE.json_request),
    )
    async def score(request: Request) -> Response:
        """Log-probs of every item's completion; over protobuf each reply is sent as soon as its item is done."""
        client = _client(request, auth.SCORE)
        body = await _read(request, _SCORE, limits)
        return _Replies(gate.score_stream(body, timeout_s=_timeout_s(request), client=client), _SCORE, request)

    @app.post(
        GENERATE.http_path,
        response_model=json_models.GenerateRepliesJson,
        responses=_error_responses(),
        openapi_extra=_request_body(_GENERATE.json_request),
    )
    async def generate(request: Request) -> Response:
        """Continuations of every item; over protobuf each reply is sent as soon as its item is done."""
        client = _client(request, auth.GENERATE)
        body = await _read(request, _GENERATE, limits)
        return _Replies(gate.generate_stream(body, timeout_s=_timeout_s(request), client=client), _GENERATE, request)

    @app.put(
        WEIGHTS_PATH.replace("{name}", "{name:path}"),
        response_model=json_models.ServedTeacherJson,
        responses=_error_responses(),
        openapi_extra=_request_body(json_models.WeightsUpdateJson),
    )
    async def update_weights(name: str, request: Request) -> Response:
        """Replaces a teacher's weights: JSON names files on the server, protobuf (an UpdateWeights stream, each message
        behind its length) brings them."""
        try:
            _client(request, auth.ADMIN)
            if _content_type(request) == JSON_TYPE:
                body = await _body(request, limits)
                update, chunks = json_models.weights_update_from_json(name, body), None
            else:
                update, chunks = await read_upload(_messages(request))
            if update.teacher != name:
                raise InvalidRequest(
                    f"teacher is {update.teacher[:80]!r}; the path says {name[:80]!r}", field="teacher"
                )
            served = await gate.update_weights(update, chunks, timeout_s=_timeout_s(request))
        except TeacherError:
            with contextlib.suppress(ClientDisconnect, RuntimeError):  # gone, or read to the end
                await read_out(request.stream())
            raise
        return _served_response(request, served, codec.encode_updated)

    @app.delete(
        TEACHER_PATH.replace("{name}", "{name:path}"),
        response_model=json_models.ServedTeacherJson,
        responses=_error_responses(),
    )
    async def unload(name: str, request: Request) -> Response:
        """Takes an adapter out of service; what is in flight finishes."""
        _client(request, auth.ADMIN)
        served = await gate.unload(name, timeout_s=_timeout_s(request))
        return _served_response(request, served, codec.encode_unloaded)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "alive"}

    @app.get("/readyz", responses=_error_responses())
    async def readyz() -> dict[str, str]:
        """Whether work is taken."""
        await gate.info()
        return {"status": "ready"}

    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        """vLLM's name for readiness, which its clients poll."""
        await gate.info()
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The metrics in Prometheus' text format."""
        return Response(metrics_text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(TeacherError)
    async def teacher_error(request: Request, error: TeacherError) -> Response:
        return _error_response(request, error)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        refusal = InvalidRequest(f"{request.method} {request.url.path[:80]}: {error.detail}; /docs lists what there is")
        answer = _error_response(request, refusal)
        answer.status_code = error.status_code
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        _log.error("unexpected failure", exc_info=error)
        return _error_response(request, EngineFailed(f"unexpected failure in the server: {type(error).__name__}"))

    openai = openai_routes.OpenAIRoutes(gate, max_body_bytes=limits.max_message_bytes)
    app.router.routes.extend(Route(path, openai) for path in openai_routes.SCOPES_OF)

    app.openapi = lambda: _with_request_schemas(FastAPI.openapi(app), needs_token=bool(access.tokens))
    return app


class _Guard:
    """ASGI middleware: lets a request through with its Caller, or refuses it before its body is read."""

    def __init__(self, app: ASGIApp, access: auth.Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["path"] not in LIVENESS_PATHS:
            request = Request(scope)
            try:
                request.state.caller = self._access.caller(request.headers.getlist(AUTHORIZATION))
            except TeacherError as error:
                answer = _error_response(request, error)
        await answer(scope, receive, send)


def _client(request: Request, scope: str) -> str:
    """The name of the caller, which has this scope."""
    caller: auth.Caller = request.state.caller
    caller.require(scope)
    address = request.client.host if request.client else ""
    return caller.client(",".join(request.headers.getlist(CLIENT_HEADER)), address)


class _Replies(Response):
    """Sends replies as they come (protobuf) or all together (JSON); closes their stream when the client vanishes."""

    def __init__(self, replies: AsyncGenerator[tuple[int, Any], None], form: _Form, request: Request) -> None:
        protobuf = _speaks_protobuf(request)
        super().__init__(media_type=PROTOBUF_TYPE if protobuf else JSON_TYPE)
        del self.headers["content-length"]
        self._chunks = _framed(replies, form) if protobuf else _as_one_json(replies, form)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        vanished = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, vanished), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            sending.cancel()
            vanished.cancel()
            await asyncio.gather(sending, vanished, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        """Starts the response with the first chunk only, so that an error before it keeps its own status."""
        started = False
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                if not started:
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    started = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _framed(replies: AsyncGenerator[tuple[int, Any], None], form: _Form) -> AsyncGenerator[bytes, None]:
    async with aclosing(replies):
        async for index, outcome in replies:
            with phase("encode"):
                chunk = frame(form.to_protobuf(index, outcome))
            yield chunk


async def _as_one_json(replies: AsyncGenerator[tuple[int, Any], None], form: _Form) -> AsyncGenerator[bytes, None]:
    async with aclosing(replies):
        outcomes = {index: outcome async for index, outcome in replies}
    with phase("encode"):
        body = form.json_replies(replies=[form.to_json(index, outcomes[index]) for index in sorted(outcomes)])
        chunk = body.model_dump_json().encode()
    yield chunk


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, form: _Form, limits: Limits) -> Any:
    """The request's record; InvalidRequest on another content type, too many bytes or a body that is no request."""
    read = form.from_json if _content_type(request) == JSON_TYPE else form.from_protobuf
    return read(await _body(request, limits))


def _content_type(request: Request) -> str:
    """One of the two types that bodies may have."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if content_type not in (PROTOBUF_TYPE, JSON_TYPE):
        raise InvalidRequest(
            f"content-type is {content_type[:80]!r}; send {PROTOBUF_TYPE} or {JSON_TYPE}", field="content-type"
        )
    return content_type


async def _body(request: Request, limits: Limits) -> bytes:
    max_body_bytes = limits.max_message_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_body_bytes:
        raise too_large(declared, max_body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_body_bytes:
                    raise too_large(f"more than {max_body_bytes}", max_body_bytes)
    except TimeoutError:
        raise DeadlineExceeded(
            f"{len(body)} bytes of the body came within {limits.body_timeout_s:g} s and more is to come; send it faster"
        ) from None
    data = bytes(body)
    check_body(data, request.headers.get(BODY_CRC_HEADER))
    return data


async def _messages(request: Request) -> AsyncGenerator[bytes, None]:
    """The messages of a body in which each stands behind its length; InvalidRequest where one is broken or cut off."""
    reader = FrameReader()
    try:
        async for piece in request.stream():
            for message in reader.feed(piece):
                yield message
        reader.finish()
    except ValueError as error:
        raise InvalidRequest(f"the body is not a stream of messages: {error}") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the upload broke off") from error


def _timeout_s(request: Request) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not timeout_s > 0:
        raise InvalidRequest(f"{TIMEOUT_HEADER} is {text[:80]!r}; it must be seconds above 0", field=TIMEOUT_HEADER)
    return timeout_s


def _speaks_protobuf(request: Request) -> bool:
    return PROTOBUF_TYPE in request.headers.get("accept", "")


def _served_response(request: Request, served: ServedTeacher, encode: Callable[[ServedTeacher], bytes]) -> Response:
    if _speaks_protobuf(request):
        return Response(frame(encode(served)), media_type=PROTOBUF_TYPE)
    return Response(json_models.ServedTeacherJson(**vars(served)).model_dump_json(), media_type=JSON_TYPE)


def _error_response(request: Request, error: TeacherError) -> Response:
    current().error = error.name
    headers = {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if _speaks_protobuf(request):
        return Response(codec.encode_error(error), error.row.http_status, headers, PROTOBUF_TYPE)
    body = json_models.ErrorReplyJson(error=json_models.error_to_json(error)).model_dump_json()
    return Response(body, error.row.http_status, headers, JSON_TYPE)


def _error_responses() -> dict[int | str, dict[str, Any]]:
    """Every status of the table with the names of its errors, for the OpenAPI document."""
    names: dict[int, list[str]] = {}
    for name, error in ERRORS.items():
        names.setdefault(error.row.http_status, []).append(name)
    return {
        status: {"model": json_models.ErrorReplyJson, "description": " or ".join(of_status)}
        for status, of_status in names.items()
    }


def _request_body(json_request: type[BaseModel]) -> dict[str, Any]:
    """The bodies an operation takes; FastAPI cannot know, because the content type decides."""
    content = {
        JSON_TYPE: {"schema": {"$ref": f"#/components/schemas/{json_request.__name__}"}},
        PROTOBUF_TYPE: {"schema": {"type": "string", "format": "binary"}},
    }
    return {"requestBody": {"required": True, "content": content}}


def _with_request_schemas(document: dict[str, Any], *, needs_token: bool) -> dict[str, Any]:
    _, schemas = models_json_schema(
        [(model, "validation") for model in _JSON_REQUESTS],
        ref_template="#/components/schemas/{model}",
    )
    document["components"]["schemas"] |= schemas["$defs"]
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document
