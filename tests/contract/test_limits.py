"""What one request and one connection may use: equal refusals with both numbers over both transports."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from protos.client import Teacher
from protos.errors import ContextTooLong, InvalidRequest, TeacherError
from protos.records import Chat, GenerateItem, Message, ScoreItem, SystemText
from protos.wire import PROTOBUF_TYPE
from teacher_server.engines.base import Engine
from teacher_server.limits import Limits
from tests.harness import LoopThread, core_over, serving

IDS = np.array([1, 2], np.int32)


def test_a_request_above_the_server_s_size_is_refused_with_both_numbers(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        core = core_over(transformers_engine, tiny_model)
        async with serving(core, limits=Limits(max_message_bytes=2000)) as server, server.connect(scheme) as teacher:
            for call in (
                teacher.score([ScoreItem(np.zeros(1000, np.int32), IDS)]),
                teacher.generate([GenerateItem(np.zeros(1000, np.int32), max_new_tokens=1)]),
            ):
                # 4 bytes an id and some around them.
                with pytest.raises(InvalidRequest, match=r"^the request has 40\d\d bytes; the limit is 2000; send few"):
                    await call
            assert (await teacher.score([ScoreItem(IDS, IDS)]))[0].num_tokens == 2

    run(scenario())


LONG = "x" * (128 * 256 + 1)
ITEMS: dict[str, tuple[ScoreItem | GenerateItem, type[TeacherError], str]] = {
    "ids": (ScoreItem(np.zeros(300, np.int32), IDS), ContextTooLong, "302 tokens do not fit into the context of 256"),
    "text": (
        ScoreItem(Chat((Message("user", LONG[4:]),)), IDS),
        ContextTooLong,
        "the text has 32769 characters; a context of 256 tokens takes at most 32768",
    ),
    "privileged text": (
        GenerateItem(Chat((Message("user", ""),)), max_new_tokens=1, privileged=SystemText(LONG)),
        ContextTooLong,
        "the text has 32773 characters; a context of 256 tokens takes at most 32768",
    ),
    "top_k": (ScoreItem(IDS, IDS, top_k=10**6), InvalidRequest, "top_k is 1000000; it must be from 0 to 304"),
    "candidates": (
        ScoreItem(IDS, IDS, candidate_ids=np.zeros((2, 5000), np.int32)),
        InvalidRequest,
        "5000 candidates a position; send at most",
    ),
    "stop ids": (
        GenerateItem(IDS, max_new_tokens=1, stop_token_ids=(1,) * 1025),
        InvalidRequest,
        "1025 stop ids; send at most 1024",
    ),
    "samples": (
        GenerateItem(IDS, max_new_tokens=1, num_samples=1025),
        InvalidRequest,
        "num_samples is 1025; it must be from 1 to 1024",
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_an_item_above_a_limit_is_refused_with_both_numbers(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path, case: str
) -> None:
    item, error, words = ITEMS[case]

    async def ask(teacher: Teacher) -> None:
        await (teacher.score([item]) if isinstance(item, ScoreItem) else teacher.generate([item]))

    async def scenario() -> None:
        async with serving(core_over(transformers_engine, tiny_model)) as server, server.connect(scheme) as teacher:
            with pytest.raises(error) as caught:
                await ask(teacher)
            assert words in caught.value.message
            assert caught.value.field.startswith("items[0]")

    run(scenario())


def test_too_many_items_are_refused_with_both_numbers(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> None:
        async with serving(core_over(transformers_engine, tiny_model)) as server, server.connect(scheme) as teacher:
            with pytest.raises(InvalidRequest, match="the request has 65 items; send at most 64"):
                await teacher.score([ScoreItem(IDS, IDS)] * 65)

    run(scenario())


@pytest.mark.parametrize("head", [b"", b"GET /healthz HTTP/1.1\r\nx-slow: "])
def test_a_connection_without_a_whole_head_is_closed(run: LoopThread, head: bytes) -> None:
    async def scenario() -> float:
        async with serving(None, limits=Limits(head_timeout_s=1.0)) as server:
            url = httpx.URL(server.listeners.http_url)
            reader, writer = await asyncio.open_connection(url.host, url.port)
            started = time.monotonic()
            reading = asyncio.create_task(reader.read())
            writer.write(head)
            while not reading.done():
                await asyncio.sleep(0.2)
                if head and not reading.done():
                    writer.write(b"x")  # a byte now and then does not keep it open
            assert await reading == b""
            writer.close()
            return time.monotonic() - started

    assert 0.9 < run(scenario()) < 10.0


def test_a_head_has_a_limit(run: LoopThread) -> None:
    async def first_line(num_bytes: int) -> bytes:
        async with serving(None) as server:
            url = httpx.URL(server.listeners.http_url)
            reader, writer = await asyncio.open_connection(url.host, url.port)
            reading = asyncio.create_task(reader.readline())
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\nx-long: ")
            written = 0
            # The refusal is read before the next piece is written: TCP's answer to that piece would throw it away.
            while written < num_bytes and not reading.done():
                writer.write(b"x" * 1024)
                written += 1024
                await asyncio.wait({reading}, timeout=0.005)
            if not reading.done():
                writer.write(b"\r\n\r\n")
            line = await reading
            writer.close()
            return line

    limit = Limits().max_head_bytes
    assert run(first_line(limit // 2)).startswith(b"HTTP/1.1 200 ")
    assert run(first_line(2 * limit)).startswith(b"HTTP/1.1 400 ")


def test_an_idle_connection_outlives_httpx_s_own_limit() -> None:
    # The server must not close an idle connection before the client drops it, or a request could meet its end.
    assert Limits().head_timeout_s > (httpx.Limits().keepalive_expiry or 0)


def test_a_body_that_comes_too_slowly_is_refused(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path
) -> None:
    async def scenario() -> bytes:
        core = core_over(transformers_engine, tiny_model)
        async with serving(core, limits=Limits(body_timeout_s=0.5, head_timeout_s=1.0)) as server:
            url = httpx.URL(server.listeners.http_url)
            reader, writer = await asyncio.open_connection(url.host, url.port)
            head = f"POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-type: {PROTOBUF_TYPE}\r\ncontent-length: 100\r\n\r\n"
            writer.write(head.encode() + b"12345")
            answer = await reader.read()  # to the end: an answered connection is not kept waiting either
            writer.close()
            return answer

    answer = run(scenario())
    assert answer.startswith(b"HTTP/1.1 504")
    assert b"5 bytes of the body came within 0.5 s" in answer
