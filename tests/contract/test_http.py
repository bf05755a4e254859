"""HTTP as people use it: JSON, the OpenAPI document, and one clear error for each wrong body."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from protos import codec
from protos.records import ScoreItem, ScoreRequest
from protos.wire import BODY_CRC_HEADER, PROTOBUF_TYPE, body_crc
from teacher_server.gate import Gate
from teacher_server.http_app import create_app
from teacher_server.limits import Limits
from teacher_server.privileged import REFERENCE_TEMPLATES
from tests.harness import LoopThread, Server

JSON_ITEM = {
    "prompt_ids": [72, 105],
    "completion_ids": [65, 66],
    "temperature": 0.7,
    "top_k": 2,
    "candidate_ids": [[1, -1], [2, 3]],
    "entropy": True,
}


@pytest.fixture
def http(run: LoopThread, transformers_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=transformers_server.listeners.http_url) as client:
        yield client


def test_json_score_equals_protobuf(run: LoopThread, transformers_server: Server, http: httpx.Client) -> None:
    answer = http.post("/v1/score", json={"items": [JSON_ITEM]})
    assert answer.status_code == 200
    [reply] = answer.json()["replies"]
    assert reply["index"] == 0
    assert reply["error"] is None
    teacher = transformers_server.connect("grpc")
    ids, completion = np.array([72, 105], np.int32), np.array([65, 66], np.int32)
    candidates = np.array([[1, -1], [2, 3]], np.int32)
    [result] = run(
        teacher.score([ScoreItem(ids, completion, temperature=0.7, top_k=2, candidate_ids=candidates, entropy=True)])
    )
    run(teacher.aclose())
    # A float32 written in full and read back is the same float32.
    for name in ("sampled_logprobs", "top_logprobs", "entropy"):
        np.testing.assert_array_equal(np.array(reply["result"][name], np.float32), getattr(result, name))
    assert reply["result"]["top_ids"] == result.top_ids.tolist()
    assert reply["result"]["candidate_logprobs"][0][1] is None
    assert np.isnan(result.candidate_logprobs[0, 1])
    assert reply["result"]["candidate_logprobs"][1] == result.candidate_logprobs[1].tolist()
    assert reply["result"]["completion_crc32"] == result.completion_crc32


def test_json_chat_with_privileged_text(http: httpx.Client) -> None:
    item = {
        "chat": {"messages": [{"role": "user", "content": "2+2?"}]},
        "privileged": {"reference": {"text": "4"}},
        "completion_ids": [65],
    }
    answer = http.post("/v1/score", json={"items": [item]})
    assert answer.status_code == 200
    plain = http.post("/v1/score", json={"items": [item | {"privileged": None}]})
    contexts = [reply.json()["replies"][0]["result"]["num_context_tokens"] for reply in (answer, plain)]
    # One token a byte: what the template adds, with the "4" and the blank line before it.
    wording = REFERENCE_TEMPLATES["answer"]
    assert contexts[0] - contexts[1] == len(f"\n\n{wording.before}4{wording.after}".encode())


def test_json_generate(http: httpx.Client) -> None:
    item = {"prompt_ids": [72], "max_new_tokens": 3, "temperature": 0, "ignore_eos": True, "num_samples": 1}
    answer = http.post("/v1/generate", json={"items": [item]})
    assert answer.status_code == 200
    [sample] = answer.json()["replies"][0]["result"]["samples"]
    assert len(sample["token_ids"]) == len(sample["logprobs"]) == 3
    assert sample["finish_reason"] == "length"


def test_json_info(http: httpx.Client) -> None:
    info = http.get("/v1/info").json()
    assert info["teachers"] == ["base", "same"]
    assert info["tokenizer"]["eos_token_ids"] == [258]


BAD_JSON: dict[str, tuple[Any, str, str]] = {
    "unknown key": ({"items": [JSON_ITEM | {"temprature": 1}]}, "items[0].temprature", "not permitted"),
    "wrong type": ({"items": [JSON_ITEM, JSON_ITEM | {"temperature": "hot"}]}, "items[1].temperature", "valid number"),
    "id beyond int32": ({"items": [JSON_ITEM | {"prompt_ids": [2**31]}]}, "items[0].prompt_ids[0]", "less than"),
    "ragged": ({"items": [JSON_ITEM | {"candidate_ids": [[1], [2, 3]]}]}, "items[0].candidate_ids", "one length"),
    "rows": ({"items": [JSON_ITEM | {"candidate_ids": [[1]] * 3}]}, "items[0].candidate_ids", "[2, M], or [1, M]"),
    "no prompt": ({"items": [{"completion_ids": [1]}]}, "items[0].prompt", "exactly one"),
    "two prompts": ({"items": [JSON_ITEM | {"chat": {"messages": []}}]}, "items[0].prompt", "exactly one"),
    "two privileged": (
        {"items": [JSON_ITEM | {"privileged": {"system": "a", "ids": [1]}}]},
        "items[0].privileged",
        "2 kinds",
    ),
    "no items": ({}, "items", "required"),
    "core's own": ({"items": [JSON_ITEM | {"temperature": -1}]}, "items[0].temperature", "above 0"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_wrong_json_body_names_its_field(http: httpx.Client, case: str) -> None:
    body, field, words = BAD_JSON[case]
    answer = http.post("/v1/score", json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["name"], error["field"]) == ("InvalidRequest", field)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        ("text/plain", b"{}", "content-type is 'text/plain'"),
        ("application/json", b"{", "Invalid JSON"),
        (PROTOBUF_TYPE, b"\xff\xff\xff", "not a protobuf ScoreRequest"),
    ],
)
def test_a_wrong_body_is_one_clear_error(http: httpx.Client, content_type: str, body: bytes, words: str) -> None:
    answer = http.post("/v1/score", content=body, headers={"content-type": content_type})
    assert answer.status_code == 422
    assert answer.json()["error"]["name"] == "InvalidRequest"
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("operation", ["score", "generate"])
def test_a_request_damaged_on_its_way_is_not_scored(http: httpx.Client, operation: str) -> None:
    body = json.dumps({"items": [JSON_ITEM]}).encode()
    damaged = body.replace(b"0.7", b"0.6")
    headers = {"content-type": "application/json", BODY_CRC_HEADER: body_crc(body)}
    answer = http.post(f"/v1/{operation}", content=damaged, headers=headers)
    assert (answer.status_code, answer.json()["error"]["name"]) == (400, "Corrupted")
    assert f"sent as {zlib.crc32(body)}" in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan"])
def test_a_wrong_deadline_is_refused(http: httpx.Client, value: str) -> None:
    answer = http.post("/v1/score", json={"items": [JSON_ITEM]}, headers={"x-timeout-s": value})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "x-timeout-s")


def test_protobuf_may_be_answered_in_json(http: httpx.Client) -> None:
    ids = np.array([1], np.int32)
    body = codec.encode_score_request(ScoreRequest((ScoreItem(ids, ids),)))
    answer = http.post("/v1/score", content=body, headers={"content-type": PROTOBUF_TYPE})
    assert len(answer.json()["replies"][0]["result"]["sampled_logprobs"]) == 1


def test_an_oversize_body_is_refused_with_both_numbers(run: LoopThread) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"x" * 80
        yield b"x" * 80

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(Gate(), bytes, limits=Limits(max_message_bytes=100)))
        headers = {"content-type": PROTOBUF_TYPE}
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            declared = client.post("/v1/score", content=b"x" * 101, headers=headers)
            streamed = client.post("/v1/score", content=chunks(), headers=headers)
            return list(await asyncio.gather(declared, streamed))

    declared, streamed = (answer.json()["error"]["message"] for answer in run(scenario()))
    assert "101 bytes; the limit is 100" in declared
    assert "more than 100 bytes; the limit is 100" in streamed


def test_the_openapi_document_is_whole(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert {"ScoreRequestJson", "ScoreItemJson", "ScoreRepliesJson", "TeacherInfo", "ErrorReplyJson"} <= names
    assert names <= set(schemas)
    assert http.get("/docs").status_code == 200


def test_a_path_or_method_that_is_not_there_is_an_error_of_the_table(
    run: LoopThread, transformers_server: Server
) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=transformers_server.listeners.http_url) as client:
            return [await client.get("/v1/scores"), await client.get("/v1/score")]

    missing, wrong_method = run(ask())
    assert (missing.status_code, wrong_method.status_code) == (404, 405)
    assert wrong_method.headers["allow"] == "POST"
    for answer, said in ((missing, "GET /v1/scores"), (wrong_method, "GET /v1/score")):
        error = answer.json()["error"]
        assert error["name"] == "InvalidRequest"
        assert said in error["message"]
