"""A TCP relay that cuts each connection as a vanishing client does: after some bytes or seconds, politely or not."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

CHUNK = 65536
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 seconds: closing sends RST, and what was not yet sent is lost."""


@dataclass(frozen=True)
class Cut:
    """Where one connection ends: whichever limit is met first.

    Attributes:
        bytes_up, bytes_down: what still passes to the server and back.
        seconds: from the connection on.
        reset: RST rather than FIN.
    """

    bytes_up: float = math.inf
    bytes_down: float = math.inf
    seconds: float | None = None
    reset: bool = False


@asynccontextmanager
async def cutting_relay(target_port: int, next_cut: Callable[[], Cut]) -> AsyncGenerator[int, None]:
    """A port of this machine whose connections lead to `target_port` until their cut."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cut = next_cut()
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target_port)
        pumps = [
            asyncio.create_task(_pump(reader, server_writer, cut.bytes_up)),
            asyncio.create_task(_pump(server_reader, writer, cut.bytes_down)),
        ]
        try:
            await asyncio.wait(pumps, timeout=cut.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, server_writer):
                _close(end, reset=cut.reset)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: float) -> None:
    """Copies until the other side ends or `limit` bytes have passed."""
    with contextlib.suppress(ConnectionError):
        while limit > 0 and (chunk := await reader.read(CHUNK)):
            passed = chunk[: int(min(limit, len(chunk)))]
            limit -= len(passed)
            writer.write(passed)
            await writer.drain()


def _close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if not reset:
        writer.close()
        return
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()
