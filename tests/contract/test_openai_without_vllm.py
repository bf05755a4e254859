"""What stock clients and servers are told before or without vLLM: charges, the gate, statuses, the token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.client import connect
from protos.errors import NotReady, TeacherError
from protos.records import ScoreItem
from teacher_server.admission import Admission
from teacher_server.engines.base import Engine
from teacher_server.gate import Gate
from teacher_server.http_app import create_app
from teacher_server.limits import Limits
from teacher_server.openai_admission import AdmittedOpenAI, num_tokens
from teacher_server.openai_routes import SCOPES_OF
from teacher_server.teachers import Teachers
from tests.harness import LoopThread, Server, core_over, serving, until

ITEM = ScoreItem(np.array([1, 2], np.int32), np.array([3, 4], np.int32))


def answering(status: int, headers: tuple[tuple[bytes, bytes], ...] = ()) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": b"why"})

    return app


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 3 + 5),
        ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 5, "n": 2}, 4 + 2 * 2 * 5),
        ("/v1/completions", {"prompt": "x" * 9}, 3 + 16),  # 9 characters are 2.25 tokens
        ("/v1/completions", {"prompt": ["x" * 9, "y"], "max_tokens": 0}, 3 + 1),
        ("/v1/chat/completions", {"messages": "x" * 8, "max_completion_tokens": 7, "n": 3}, 2 + 3 * 7),
        ("/v1/chat/completions", {"messages": "x" * 8}, 2 + 1024),
        ("/v1/completions", {"prompt": None, "max_tokens": "many", "n": -1}, 1 + 16),  # "null" is 4 characters
        ("/v1/completions", [], 1),
    ],
)
def test_what_a_stock_request_is_charged(path: str, body: object, expected: int) -> None:
    assert num_tokens(path, json.dumps(body).encode()) == expected


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_is_charged_one_token(body: bytes) -> None:
    assert num_tokens("/v1/completions", body) == 1


def test_a_stock_client_that_vanishes_leaves_the_queue(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        admission, teachers = Admission(100, 1000), Teachers(("base",))
        app = AdmittedOpenAI(answering(200), admission, teachers, "base", max_tokens=100)
        async with serving(None) as server, httpx.AsyncClient(base_url=server.url("http")) as http:
            server.gate.open(core_over(transformers_engine, tiny_model), app)
            [busy] = admission.admit([100], "other")
            asking = asyncio.create_task(http.post("/v1/completions", json={"prompt": [1] * 20, "max_tokens": 10}))
            await until(lambda: admission.tokens_queued == 30)
            asking.cancel()
            await until(lambda: admission.tokens_queued == 0)
            admission.release(busy)
            # Larger than the budget: it is charged all of it, and enters alone.
            assert (await http.post("/v1/completions", json={"prompt": [1], "max_tokens": 10**30})).text == "why"
            assert admission.tokens_in_flight == 0

    run(scenario())


def test_a_server_that_loads_or_drains_is_not_ready(run: LoopThread) -> None:
    async def scenario() -> None:
        async with serving(None) as server, httpx.AsyncClient(base_url=server.url("http")) as http:
            for words in ("still loading", "draining"):
                for path in (*SCOPES_OF, "/health"):
                    answer = await http.get(path)
                    assert answer.status_code == 503, path
                    assert words in answer.json()["error"]["message"]
                server.gate.close("draining")

    run(scenario())


def test_another_engine_says_so(run: LoopThread, transformers_server: Server) -> None:
    with httpx.Client(base_url=transformers_server.url("http")) as http:
        assert http.get("/health").status_code == 200
        for path in SCOPES_OF:
            answer = http.post(path, json={})
            assert answer.status_code == 404
            assert "serve with --engine vllm" in answer.json()["error"]["message"]
    client = openai.OpenAI(base_url=f"{transformers_server.url('http')}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.NotFoundError, match="serve with --engine vllm"):
        client.models.list()


def test_a_drain_waits_for_stock_clients(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    arrived, door = asyncio.Event(), asyncio.Event()

    async def slow_app(scope: Scope, receive: Receive, send: Send) -> None:
        arrived.set()
        await door.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    async def scenario() -> None:
        async with serving(None) as server, httpx.AsyncClient(base_url=server.url("http")) as http:
            server.gate.open(core_over(transformers_engine, tiny_model), slow_app)
            asking = asyncio.create_task(http.get("/v1/models"))
            await arrived.wait()
            server.gate.close("draining")
            idle = asyncio.create_task(server.gate.idle())
            await asyncio.sleep(0.05)
            assert not idle.done()
            door.set()
            assert (await asking).text == "late"
            await asyncio.wait_for(idle, 5)

    run(scenario())


def test_a_body_has_a_limit(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def reading_app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass

    async def scenario() -> httpx.Response:
        gate = Gate()
        gate.open(core_over(transformers_engine, tiny_model), reading_app)
        transport = httpx.ASGITransport(create_app(gate, bytes, limits=Limits(max_message_bytes=100)))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
            return await http.post("/v1/completions", content=b"x" * 101)

    answer = run(scenario())
    assert answer.status_code == 422
    assert "more than 100 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503, 504])
def test_a_status_is_an_error_of_the_table(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, status: int
) -> None:
    expected = {
        400: "Corrupted",  # in plain text: what vLLM itself refuses comes in JSON
        401: "Unauthenticated",
        403: "PermissionDenied",
        404: "UnknownTeacher",
        429: "Overloaded",
        500: "EngineFailed",
        503: "NotReady",
        504: "NotReady",
    }

    async def scenario() -> TeacherError:
        async with serving(None) as server, connect(f"openai+{server.url('http')}") as teacher:
            app = answering(status, ((b"retry-after", b"7"),))
            server.gate.open(core_over(transformers_engine, tiny_model), app)
            with pytest.raises(TeacherError, match=f"answered {status}: why") as caught:
                await teacher.score([ITEM])
            return caught.value

    error = run(scenario())
    assert error.name == expected[status]
    assert error.retry_after_s == 7.0


def test_a_server_that_is_not_there_is_not_ready(run: LoopThread) -> None:
    async def scenario() -> None:
        async with connect("openai+http://127.0.0.1:9") as teacher:
            with pytest.raises(NotReady, match="cannot be reached"):
                await teacher.score([ITEM])

    run(scenario())


def test_the_token_is_sent(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]).get(b"authorization", b""))
        await answering(401)(scope, receive, send)

    async def scenario() -> None:
        async with serving(None) as server:
            server.gate.open(core_over(transformers_engine, tiny_model), app)
            for value in (None, "secret"):
                if value is not None:
                    monkeypatch.setenv("TEACHER_TOKEN", value)
                async with connect(f"openai+{server.url('http')}") as teacher:
                    with pytest.raises(TeacherError):
                        await teacher.info()

    monkeypatch.delenv("TEACHER_TOKEN", raising=False)
    run(scenario())
    assert seen == [b"", b"Bearer secret"]
