"""The two listeners, HTTP and gRPC, in one event loop over one gate."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator, Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from teacher_server.auth import OPEN, Access
from teacher_server.config import StartError
from teacher_server.gate import Gate
from teacher_server.grpc_service import GrpcListener
from teacher_server.http_app import create_app
from teacher_server.limits import DEFAULT_LIMITS, Limits
from teacher_server.metrics import Metrics
from teacher_server.observation import Observation, Observe
from teacher_server.observers import ObservedApp
from teacher_server.tls import ServerTls

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Listeners:
    """Both listeners, bound and answering; build them with `await Listeners.start(...)`.

    Attributes:
        http_url, grpc_url: what a client on this machine connects to.
    """

    def __init__(
        self,
        http: uvicorn.Server,
        http_task: asyncio.Task[None],
        grpc: GrpcListener,
        metrics: Metrics,
        urls: tuple[str, str],
    ) -> None:
        self.http_url, self.grpc_url = urls
        self._http = http
        self._http_task = http_task
        self._grpc = grpc
        self._metrics = metrics

    @classmethod
    async def start(
        cls,
        gate: Gate,
        metrics: Metrics,
        *,
        host: str,
        http_port: int,
        grpc_port: int,
        access: Access = OPEN,
        tls: ServerTls | None = None,
        limits: Limits = DEFAULT_LIMITS,
        observers: Sequence[Observe] = (),
    ) -> Listeners:
        """Binds both ports (0 picks a free one) and starts to answer.

        Every request that has ended is handed to the metrics and to `observers`.

        Raises:
            StartError: a port cannot be had, or a file of `tls` cannot be used; the message names it.
        """

        def observe(request: Observation) -> None:
            for each in (metrics.observe, *observers):
                each(request)

        tls_context = None if tls is None else tls.context()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            http_socket = socket.create_server((host, http_port), family=family)
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{http_port} for HTTP: {error.strerror}") from error
        address = f"[{host}]" if ":" in host else host
        grpc_listener = GrpcListener(gate, access, limits, observe)
        try:
            grpc_port = (
                grpc_listener.server.add_insecure_port(f"{address}:{grpc_port}")
                if tls is None
                else grpc_listener.server.add_secure_port(f"{address}:{grpc_port}", tls.grpc_credentials())
            )
        except RuntimeError as error:
            http_socket.close()
            raise StartError(f"cannot listen on {host}:{grpc_port} for gRPC: the port is in use or not ours") from error
        await grpc_listener.set_ready(False)
        await grpc_listener.server.start()

        http = _Uvicorn(
            uvicorn.Config(
                ObservedApp(create_app(gate, metrics.text, access, limits), observe),
                http=_Http,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=round(limits.head_timeout_s),
                h11_max_incomplete_event_size=limits.max_head_bytes,
                ssl_context_factory=None if tls_context is None else lambda _config, _default: tls_context,
            )
        )
        local = _WILDCARDS.get(host, host)
        local = f"[{local}]" if ":" in local else local
        secure = "" if tls is None else "s"
        urls = (f"http{secure}://{local}:{http_socket.getsockname()[1]}", f"grpc{secure}://{local}:{grpc_port}")
        return cls(http, asyncio.create_task(http.serve([http_socket])), grpc_listener, metrics, urls)

    async def set_ready(self, ready: bool) -> None:
        """What gRPC health and the metrics say from now on; /readyz asks the gate itself."""
        self._metrics.ready.set(ready)
        await self._grpc.set_ready(ready)

    async def stop(self, grace_s: float) -> None:
        """Stops both; what is still in flight `grace_s` seconds later is cancelled."""
        self._http.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._http.should_exit = True
        await asyncio.gather(self._grpc.server.stop(grace_s), self._http_task)


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to the process, which has two listeners to drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Http(H11Protocol):
    """Closes a connection that stays without a whole request head for the time that an idle one may stay open.

    uvicorn's own protocol waits for ever for the first head, and begins to wait anew at every byte of a later one.
    Its other protocol, over httptools, has no limit to the size of a head.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()  # a whole head ends the wait
