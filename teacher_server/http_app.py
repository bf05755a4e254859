"""The HTTP face of the gate: bodies to records and back, errors to statuses; no rule of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
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
    EngineFailed,
    InvalidRequest,
    TeacherError,
    Unauthenticated,
)
from protos.records import ServedTeacher, TeacherInfo
from protos.wire import (
    AUTHORIZATION,
    CLIENT_HEADER,
    GENERATE,
    GET_INFO,
    JSON_TYPE,
    PROTOBUF_TYPE,
    SCORE,
    TEACHER_PATH,
    TIMEOUT_HEADER,
    WEIGHTS_PATH,
    frame,
)
from teacher_server import auth, openai_routes
from teacher_server.gate import Gate
from teacher_server.http_body import content_type, messages, read_body, read_record
from teacher_server.http_replies import Outcomes, Replies, as_one_json, framed
from teacher_server.limits import DEFAULT_LIMITS, Limits
from teacher_server.observation import current
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

    async def read(self, request: Request, limits: Limits) -> Any:
        """See http_body.read_record."""
        return await read_record(request, limits, from_json=self.from_json, from_protobuf=self.from_protobuf)

    def replies(self, request: Request, outcomes: Outcomes) -> Replies:
        """The outcomes in the form that the client asked for."""
        if _speaks_protobuf(request):
            return framed(outcomes, self.to_protobuf)
        return as_one_json(outcomes, self.to_json, self.json_replies)


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
        asked = await _SCORE.read(request, limits)
        return _SCORE.replies(request, gate.score_stream(asked, timeout_s=_timeout_s(request), client=client))

    @app.post(
        GENERATE.http_path,
        response_model=json_models.GenerateRepliesJson,
        responses=_error_responses(),
        openapi_extra=_request_body(_GENERATE.json_request),
    )
    async def generate(request: Request) -> Response:
        """Continuations of every item; over protobuf each reply is sent as soon as its item is done."""
        client = _client(request, auth.GENERATE)
        asked = await _GENERATE.read(request, limits)
        return _GENERATE.replies(request, gate.generate_stream(asked, timeout_s=_timeout_s(request), client=client))

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
            if content_type(request) == JSON_TYPE:
                body = await read_body(request, limits)
                update, chunks = json_models.weights_update_from_json(name, body), None
            else:
                update, chunks = await read_upload(messages(request))
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
    """ASGI middleware: lets a request through with its Caller and the name it is charged to, or refuses it before its
    body is read.
    """

    def __init__(self, app: ASGIApp, access: auth.Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["path"] not in LIVENESS_PATHS:
            request = Request(scope)
            try:
                caller = self._access.caller(request.headers.getlist(AUTHORIZATION))
                address = request.client.host if request.client else ""
                request.state.caller = caller
                request.state.client = caller.client(",".join(request.headers.getlist(CLIENT_HEADER)), address)
            except TeacherError as error:
                answer = _error_response(request, error)
        await answer(scope, receive, send)


def _client(request: Request, scope: str) -> str:
    """The name of the caller, which has this scope."""
    caller: auth.Caller = request.state.caller
    caller.require(scope)
    return request.state.client


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
