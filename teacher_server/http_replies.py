"""The replies of one HTTP request: sent as they come (protobuf) or all together (JSON), and stopped with its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protos.wire import JSON_TYPE, PROTOBUF_TYPE, frame
from teacher_server.observation import phase

Outcomes = AsyncGenerator[tuple[int, Any], None]
"""The index of an item in its request, and its result or error."""


class Replies(Response):
    """Sends these chunks; closes their stream when the client vanishes.

    Args:
        chunks: of `framed` or `as_one_json`.
        media_type: theirs.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
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


def framed(outcomes: Outcomes, encode: Callable[[int, Any], bytes]) -> Replies:
    """One protobuf message for each outcome, behind its length."""
    return Replies(_framed(outcomes, encode), PROTOBUF_TYPE)


def as_one_json(
    outcomes: Outcomes, encode: Callable[[int, Any], BaseModel], together: Callable[..., BaseModel]
) -> Replies:
    """One JSON document of all outcomes, `together(replies=[...])` in the order of the items."""
    return Replies(_as_one_json(outcomes, encode, together), JSON_TYPE)


async def _framed(outcomes: Outcomes, encode: Callable[[int, Any], bytes]) -> AsyncGenerator[bytes, None]:
    async with aclosing(outcomes):
        async for index, outcome in outcomes:
            with phase("encode"):
                chunk = frame(encode(index, outcome))
            yield chunk


async def _as_one_json(
    outcomes: Outcomes, encode: Callable[[int, Any], BaseModel], together: Callable[..., BaseModel]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(outcomes):
        by_index = {index: outcome async for index, outcome in outcomes}
    with phase("encode"):
        body = together(replies=[encode(index, by_index[index]) for index in sorted(by_index)])
        chunk = body.model_dump_json().encode()
    yield chunk


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
