"""A TCP relay that counts: what a client and a server really send each other, whatever the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

CHUNK_BYTES = 2**16


class WireMeter:
    """Relays connections to one address and counts the bytes each way; build it with `async with WireMeter.to(...)`.

    Attributes:
        address: "127.0.0.1:port", which stands for the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self.address = ""
        self._target = (host, port)
        self._num_sent = 0
        self._num_received = 0

    @classmethod
    @asynccontextmanager
    async def to(cls, host: str, port: int) -> AsyncIterator[WireMeter]:
        """A meter that relays to `host:port` until the block ends."""
        meter = cls(host, port)
        server = await asyncio.start_server(meter._relay, "127.0.0.1", 0)
        meter.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield meter
        finally:
            server.close()

    def counts(self) -> tuple[int, int]:
        """Bytes sent to the server and received from it so far."""
        return self._num_sent, self._num_received

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError):
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            with closing(server_writer):
                pumps = (
                    asyncio.create_task(self._pump(reader, server_writer, 1, 0)),
                    asyncio.create_task(self._pump(server_reader, writer, 0, 1)),
                )
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                for pump in pumps:
                    pump.cancel()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: int, received: int) -> None:
        with suppress(ConnectionError):
            while chunk := await reader.read(CHUNK_BYTES):
                self._num_sent += sent * len(chunk)
                self._num_received += received * len(chunk)
                writer.write(chunk)
                await writer.drain()
