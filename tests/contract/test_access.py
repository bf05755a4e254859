"""Auth over both transports: equal errors, everything but liveness guarded, and no secret in any error or log line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.errors import PermissionDenied, TeacherError, Unauthenticated
from protos.records import GenerateItem, ScoreItem
from teacher_server.auth import GENERATE, SCORE, Access, Token, sha256_of
from teacher_server.engines.base import Engine
from tests.harness import LoopThread, core_over, serving

FULL, SCORER, NONE, WRONG = (f"{name}-0123456789abcdef" for name in ("full", "scorer", "none", "wrong"))
ACCESS = Access(
    (
        Token("full", sha256_of(FULL), frozenset({SCORE, GENERATE})),
        Token("scorer", sha256_of(SCORER), frozenset({SCORE})),
        Token("none", sha256_of(NONE), frozenset()),
    )
)
IDS = np.array([1, 2], np.int32)
ITEM, TEXT = ScoreItem(IDS, IDS), GenerateItem(IDS, max_new_tokens=1)


async def refusals(server: Any, scheme: str, token: str) -> list[tuple[str, str, str] | None]:
    """How info, score and generate are refused: name, message and field; None where they are not."""
    outcomes: list[tuple[str, str, str] | None] = []
    async with server.connect(scheme, token=token) as teacher:
        for call in (teacher.info(), teacher.score([ITEM]), teacher.generate([TEXT])):
            try:
                await call
                outcomes.append(None)
            except TeacherError as error:
                outcomes.append((error.name, error.message, error.field))
    return outcomes


def test_equal_refusals_over_both_transports_and_no_secret_in_them(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> dict[str, list[tuple[str, str, str] | None]]:
        async with serving(core_over(transformers_engine, tiny_model), access=ACCESS) as server:
            over = {
                scheme: {token: await refusals(server, scheme, token) for token in (FULL, SCORER, NONE, WRONG, "")}
                for scheme in ("http", "grpc")
            }
        assert over["http"] == over["grpc"]
        return over["http"]

    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as lines:
        refused = run(scenario())
    names = {token: [outcome and outcome[0] for outcome in outcomes] for token, outcomes in refused.items()}
    assert names == {
        FULL: [None, None, None],
        SCORER: [None, None, "PermissionDenied"],
        NONE: [None, "PermissionDenied", "PermissionDenied"],
        WRONG: ["Unauthenticated"] * 3,
        "": ["Unauthenticated"] * 3,
    }
    served = {line["client"] for line in lines if line["event"] == "request" and not line["error"]}
    assert served == {"full", "scorer"}
    written = f"{refused.values()}{lines}{caplog.text}"
    for secret in (FULL, SCORER, NONE, WRONG):
        assert secret not in written


def test_http_guards_all_but_liveness(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> None:
        async with (
            serving(core_over(transformers_engine, tiny_model), access=ACCESS) as server,
            httpx.AsyncClient(base_url=server.listeners.http_url) as client,
        ):
            for path in ("/healthz", "/readyz"):
                assert (await client.get(path)).status_code == 200
            guarded = ("/v1/info", "/metrics", "/docs", "/openapi.json", "/redoc", "/no/such/path", "/healthz/")
            for path in guarded:
                answer = await client.get(path)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
                assert answer.json()["error"]["name"] == "Unauthenticated"
            for path in guarded[:5]:
                answer = await client.get(path, headers={"authorization": f"Bearer {NONE}"})
                assert answer.status_code == 200, path
            document = (await client.get("/openapi.json", headers={"authorization": f"Bearer {NONE}"})).json()
            assert document["security"] == [{"token": []}]
            # What scores or writes for stock clients needs both scopes; this engine has no such application: 404.
            for token, status in ((NONE, 403), (SCORER, 403), (FULL, 404)):
                for path in ("/v1/completions", "/v1/chat/completions"):
                    answer = await client.post(path, headers={"authorization": f"Bearer {token}"})
                    assert answer.status_code == status, path
            # Refused before the body is read, whatever it is.
            answer = await client.post("/v1/score", content=b"\xff" * 100)
            assert answer.status_code == 401

    run(scenario())


def test_grpc_guards_all_but_health(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def listed(channel: aio.Channel, token: str) -> int:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # pyright: ignore[reportArgumentType]
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        call = stub.ServerReflectionInfo(metadata=metadata)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.done_writing()
        return len((await call.read()).list_services_response.service)

    async def scenario() -> None:
        async with (
            serving(core_over(transformers_engine, tiny_model), access=ACCESS) as server,
            aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://")) as channel,
        ):
            check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]
            assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
            assert await listed(channel, NONE) >= 3
            for call in (listed(channel, ""), channel.unary_unary("/no.such.Service/Method")(b"")):
                with pytest.raises(aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    run(scenario())


def test_a_token_comes_from_the_environment(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(core_over(transformers_engine, tiny_model), access=ACCESS) as server:
            async with server.connect(scheme) as teacher:
                await teacher.score([ITEM])
                with pytest.raises(PermissionDenied):
                    await teacher.generate([TEXT])
            async with server.connect(scheme, token="") as teacher:
                with pytest.raises(Unauthenticated):
                    await teacher.info()

    monkeypatch.setenv("TEACHER_TOKEN", SCORER)
    run(scenario())
