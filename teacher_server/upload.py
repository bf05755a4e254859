"""An upload of weights as both transports carry it: one header, then chunks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from protos import codec
from protos.errors import InvalidRequest
from protos.records import WeightsUpdate

READ_OUT_S = 60.0
"""How long an upload that is refused already may go on before its connection is cut."""


async def read_upload(messages: AsyncIterable[bytes]) -> tuple[WeightsUpdate, AsyncGenerator[bytes, None]]:
    """The header, and the chunks as they come; InvalidRequest where the messages are in another order."""
    rest = aiter(messages)
    header = codec.decode_weights_part(await anext(rest, b""))
    if isinstance(header, bytes):
        raise InvalidRequest("the first message holds a chunk; send the header first", field="part")
    return header, _chunks(rest)


async def _chunks(messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    async for message in messages:
        chunk = codec.decode_weights_part(message)
        if not isinstance(chunk, bytes):
            raise InvalidRequest("a second header; one upload is for one teacher", field="part")
        yield chunk


async def read_out(pieces: AsyncIterable[bytes]) -> None:
    """Reads what the client of a refused upload still sends.

    The answer would be lost otherwise: TCP resets a connection that is closed on unread bytes, and gRPC's Python client
    reports a failed write in place of the status that was the reason for it.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_OUT_S):
            async for _ in pieces:
                pass
