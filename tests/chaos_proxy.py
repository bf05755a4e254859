"""A TCP proxy that damages what passes through it: bytes flipped, held back, connections cut; seeded and counted."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from random import Random

CHUNK_BYTES = 65536


@dataclass
class Faults:
    """What happens to a chunk of bytes, each with its own probability."""

    flip: float = 0.0
    cut: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.3


class ChaosProxy:
    """Forwards connections to `port` of this machine; build it with `await ChaosProxy.start(port, seed)`.

    Attributes:
        port: where it listens.
        faults: of now; may be set at any time.
        num_flipped, num_cut, num_delayed: what it has done.
    """

    def __init__(self, target_port: int, seed: int) -> None:
        self.faults = Faults()
        self.port = 0
        self.num_flipped = self.num_cut = self.num_delayed = 0
        self._target_port = target_port
        self._random = Random(seed)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, target_port: int, seed: int) -> ChaosProxy:
        """Listens on a free port."""
        proxy = cls(target_port, seed)
        proxy._server = await asyncio.start_server(proxy._connection, "127.0.0.1", 0)
        proxy.port = proxy._server.sockets[0].getsockname()[1]
        return proxy

    @property
    def num_done(self) -> tuple[int, int, int]:
        """Flipped, cut, delayed: what it has done."""
        return self.num_flipped, self.num_cut, self.num_delayed

    async def move(self, target_port: int) -> None:
        """Forwards to another port from now on; every connection ends, as when a server is replaced."""
        self._target_port = target_port
        self._cut_all()

    async def stop(self) -> None:
        """Cuts every connection and stops listening."""
        assert self._server is not None
        self._server.close()
        self._cut_all()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def _cut_all(self) -> None:
        for task in self._connections:
            task.cancel()

    async def _connection(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers = [client_out]
        try:
            server_in, server_out = await asyncio.open_connection("127.0.0.1", self._target_port)
            writers.append(server_out)
            directions = {
                asyncio.create_task(self._forward(client_in, server_out)),
                asyncio.create_task(self._forward(server_in, client_out)),
            }
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
        except OSError:
            pass  # the server behind is away: the client sees its connection end
        finally:
            for writer in writers:
                writer.transport.abort()
            self._connections.discard(task)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Until either side ends or the connection is cut."""
        with suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                faults = self.faults
                if self._random.random() < faults.cut:
                    self.num_cut += 1
                    return
                if self._random.random() < faults.delay:
                    self.num_delayed += 1
                    await asyncio.sleep(faults.delay_s)
                if self._random.random() < faults.flip:
                    self.num_flipped += 1
                    damaged = bytearray(chunk)
                    damaged[self._random.randrange(len(chunk))] ^= 1 << self._random.randrange(8)
                    chunk = bytes(damaged)
                sink.write(chunk)
                await sink.drain()
