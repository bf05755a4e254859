"""Real servers in this process, real sockets, one event loop: what the contract's tests and others stand on."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Generic, TypeVar

from protos.client import Teacher, connect
from protos.credentials import Tls
from protos.pool import PoolOptions, TeacherPool
from teacher_server.admission import Admission
from teacher_server.auth import OPEN, Access
from teacher_server.core import TeacherCore
from teacher_server.engines.base import Continuations, Engine, EngineInfo, GenerateTask, ScoreRows, ScoreTask
from teacher_server.gate import Core, Gate
from teacher_server.limits import DEFAULT_LIMITS, Limits
from teacher_server.listeners import Listeners
from teacher_server.metrics import Metrics
from teacher_server.observation import Observe
from teacher_server.teachers import Teachers
from teacher_server.tls import ServerTls
from teacher_server.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 120.0

START_S = 240.0
"""vLLM's start takes up to a minute on a CPU; on a busy machine several."""

_T = TypeVar("_T")
_Engine = TypeVar("_Engine", bound=Engine)


class LoopThread:
    """One event loop in a thread of its own; servers and clients of a test session share it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __call__(self, work: Coroutine[Any, Any, _T], timeout_s: float = WAIT_S) -> _T:
        """The coroutine's result; its exceptions are raised here."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    @contextmanager
    def entered(self, context: AbstractAsyncContextManager[_T]) -> Iterator[_T]:
        """What the context gives, entered and left in this loop."""
        value = self(context.__aenter__(), START_S)
        try:
            yield value
        finally:
            self(context.__aexit__(None, None, None))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        gc.collect()


@dataclass
class Server:
    """A server that answers on free ports of this machine."""

    gate: Gate
    listeners: Listeners

    def url(self, scheme: str) -> str:
        """Of one transport, or of a pool whose two replicas are the two transports."""
        urls = {"http": self.listeners.http_url, "grpc": self.listeners.grpc_url}
        return ",".join(urls.values()) if scheme == "pool" else urls[scheme]

    def connect(self, scheme: str, *, token: str | None = None, tls: Tls | None = None) -> Teacher:
        if scheme == "pool":
            # Split from the first token on, so that both replicas answer every request of two items or more.
            return TeacherPool(self.url(scheme), partial(connect, token=token, tls=tls), PoolOptions(min_part_tokens=1))
        return connect(self.url(scheme), token=token, tls=tls)

    async def stop(self) -> None:
        """Stops both listeners, and lets go of the engine: gRPC keeps a stopped server until the interpreter's end,
        too late for vLLM, whose own modules are gone by then.
        """
        self.gate.close("the server has stopped")
        await self.listeners.stop(0.0)


async def start_server(
    core: Core | None,
    metrics: Metrics | None = None,
    *,
    access: Access = OPEN,
    tls: ServerTls | None = None,
    limits: Limits = DEFAULT_LIMITS,
    observers: Sequence[Observe] = (),
) -> Server:
    """A ready server over `core`, or one that is still loading."""
    gate, metrics = Gate(), metrics or Metrics()
    listeners = await Listeners.start(
        gate,
        metrics,
        host="127.0.0.1",
        http_port=0,
        grpc_port=0,
        access=access,
        tls=tls,
        limits=limits,
        observers=observers,
    )
    if core is not None:
        gate.open(core)
        await listeners.set_ready(True)
    return Server(gate, listeners)


@asynccontextmanager
async def serving(
    core: Core | None,
    metrics: Metrics | None = None,
    *,
    access: Access = OPEN,
    tls: ServerTls | None = None,
    limits: Limits = DEFAULT_LIMITS,
    observers: Sequence[Observe] = (),
) -> AsyncIterator[Server]:
    """`start_server`, stopped at the end."""
    server = await start_server(core, metrics, access=access, tls=tls, limits=limits, observers=observers)
    try:
        yield server
    finally:
        await server.stop()


def core_over(
    engine: Engine,
    model: Path,
    *,
    max_items: int = 64,
    max_top_k: int | None = None,
    admission: Admission | None = None,
    teachers: Teachers | None = None,
) -> TeacherCore:
    """A core over `engine` with the tokenizer of `model`; must be called where the event loop runs."""
    return TeacherCore(
        engine,
        ChatTokenizer.load(str(model)),
        admission or Admission(2**20, 2**20),
        teachers=teachers or Teachers(("base", "same")),
        max_items=max_items,
        max_top_k=max_top_k,
    )


@contextmanager
def served(run: LoopThread, model: Path) -> Iterator[str]:
    """The gRPC URL of a server of the model in a folder, over the reference engine."""
    with server_of(run, model) as server:
        yield server.url("grpc")


@contextmanager
def server_of(run: LoopThread, model: Path, engine: str = "transformers", *, max_items: int = 64) -> Iterator[Server]:
    """A server of the model in a folder, over an engine of its own: "transformers" or "vllm"."""

    async def start() -> tuple[Engine, Server]:
        own = await _start_engine(engine, model)
        return own, await start_server(core_over(own, model, max_items=max_items))

    own, server = run(start(), START_S)
    try:
        yield server
    finally:
        run(server.stop())
        run(own.close())


async def _start_engine(name: str, model: Path) -> Engine:
    if name == "vllm":
        from teacher_server.engines.vllm import VllmEngine

        return await VllmEngine.create(str(model))
    from teacher_server.engines.transformers import TransformersEngine

    return TransformersEngine(str(model))


@dataclass
class EngineOver(Generic[_Engine]):
    """A real engine behind another, which its subclasses make different in one way; the inner one is its owner's."""

    inner: _Engine

    @property
    def info(self) -> EngineInfo:
        return self.inner.info

    @property
    def num_unfinished(self) -> int:
        return self.inner.num_unfinished

    async def score(self, task: ScoreTask) -> ScoreRows:
        return await self.inner.score(task)

    async def generate(self, task: GenerateTask) -> Continuations:
        return await self.inner.generate(task)

    async def died(self) -> None:
        await self.inner.died()

    async def close(self) -> None:
        pass


@dataclass
class HeldEngine(EngineOver[Engine]):
    """A real engine behind a door: work waits until `door` is set, and counts while it waits or runs."""

    door: asyncio.Event = field(default_factory=asyncio.Event)
    num_active: int = 0
    num_started: int = 0

    @property
    def num_unfinished(self) -> int:
        return self.num_active

    async def score(self, task: ScoreTask) -> ScoreRows:
        async with self._through():
            return await self.inner.score(task)

    async def generate(self, task: GenerateTask) -> Continuations:
        async with self._through():
            return await self.inner.generate(task)

    async def close(self) -> None:
        self.door.set()

    @asynccontextmanager
    async def _through(self) -> AsyncGenerator[None, None]:
        self.num_active += 1
        self.num_started += 1
        try:
            await self.door.wait()
            yield
        finally:
            self.num_active -= 1


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """The URL of an OTLP collector, and the path and body of everything posted to it."""
    received: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            answering.join()


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Waits until `condition()` holds; fails after `timeout_s` seconds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
