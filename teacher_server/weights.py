"""Changes what is served while it is served: new weights for the model, LoRA adapters in, replaced and out.

Weights are checked against the model's own before anything is touched. The model's weights change in place, between
items: those in flight finish on the old ones, later ones wait. If loading fails, the weights served before are loaded
again from their files; if that fails too, or no file has them, the engine is closed, for nobody knows what it would
answer.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import structlog

from protos.errors import Conflict, EngineFailed, InvalidRequest, UnknownTeacher
from protos.records import ServedTeacher, TeacherKind, WeightsTransfer, WeightsUpdate
from teacher_server.changes import to_its_end, within
from teacher_server.engines.base import (
    Adapter,
    EngineDeadError,
    TransferEngine,
    WeightsEngine,
    WeightsUntouchedError,
)
from teacher_server.served_model import ServedModel
from teacher_server.staging import MAX_CONFIG_BYTES, Staged, Staging, refuse_bytes
from teacher_server.teachers import FIRST_VERSION, Teachers, Weights
from teacher_server.transfer import check_transfer

NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a teacher that comes over the network may be called: it goes into URLs, logs and metrics."""

MAX_TRANSFER_S = 600.0
"""Of a transfer whose caller gave no deadline; nothing is served meanwhile."""

WORKERS_SHARE = 0.9
"""Of the time left until a transfer's deadline: the caller gets the workers' own error then, with the reason."""

GRACE_S = 5.0
"""After a transfer's deadline, for workers that give up by themselves; then the engine is closed."""

_ADAPTER_IDS = itertools.count(1)

_log = structlog.get_logger()


class WeightsAdmin:
    """A TeacherAdmin over one engine and its teachers.

    Args:
        spool: a folder of this server's own, for what it receives; empty at the start.
        root: paths in updates must lie below it; None takes no paths.
        max_adapters, max_lora_rank: what the engine was built for.
        died: told when the engine was closed because its weights are lost.
    """

    def __init__(
        self,
        engine: WeightsEngine,
        teachers: Teachers,
        model: ServedModel,
        *,
        spool: Path,
        root: Path | None = None,
        max_adapters: int = 0,
        max_lora_rank: int = 0,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._teachers = teachers
        self._model = model
        self._staging = Staging(model, spool, root, max_lora_rank)
        self._current: Staged | None = self._staging.of_the_start
        self._max_adapters = max_adapters
        self._died = died
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """See TeacherAdmin."""
        until = asyncio.get_running_loop().time() + (MAX_TRANSFER_S if timeout_s is None else timeout_s)
        async with within(timeout_s):
            self._check(update)
            self._teachers.check_version(update.teacher, update.version)
            if update.transfer is not None:
                self._check_kind(update, "model")
                await refuse_bytes(chunks, "transfer")
                await self._receive_model(update, update.transfer, until)
            else:
                await self._take_files(update, chunks)
        return self._found(update.teacher)

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """See TeacherAdmin."""
        async with within(timeout_s), self._changing:
            served = self._found(teacher)
            if served.kind == "model":
                raise InvalidRequest(f"{teacher!r} is the model itself; only adapters can be unloaded", field="teacher")
            self._retire(self._teachers.remove_adapter(teacher))
            return served

    async def serve_adapter(self, teacher: str, path: Path) -> None:
        """Serves the adapter in the folder `path`, which the operator chose, as a new teacher.

        Raises:
            InvalidRequest: the folder holds no adapter for this model.
            Conflict: there are as many adapters as there may be.
        """
        async with self._staging.folder() as folder:
            staged = await asyncio.to_thread(self._staging.adapter_folder, path, folder)
            await self._put_adapter(teacher, FIRST_VERSION, staged)

    async def close(self) -> None:
        """Stops waiting for adapters to fall out of use; the engine and the spool are their owner's."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)

    def _check(self, update: WeightsUpdate) -> None:
        """What can be said before any byte is read."""
        decay = update.ema_decay
        if decay is not None and not (math.isfinite(decay) and 0 <= decay < 1):
            raise InvalidRequest(f"ema_decay is {decay}; it must be from 0 to below 1", field="ema_decay")
        if update.transfer is not None:
            for name in ("path", "adapter_config", "ema_decay"):
                if getattr(update, name):
                    raise InvalidRequest(f"{name} is for weights in files, and a transfer has none", field=name)
            check_transfer(update.transfer, self._engine.info.weights_transfer, self._model)
        if update.path and update.adapter_config:
            raise InvalidRequest("adapter_config is for streamed bytes; a path has its own", field="adapter_config")
        if len(update.adapter_config) > MAX_CONFIG_BYTES:
            raise InvalidRequest(
                f"adapter_config has {len(update.adapter_config)} characters; the limit is {MAX_CONFIG_BYTES}",
                field="adapter_config",
            )
        if self._teachers.find(update.teacher) is None and not NEW_NAME.fullmatch(update.teacher):
            raise InvalidRequest(
                f"{update.teacher[:80]!r} cannot be a teacher's name; it must be 1 to 64 letters, digits, '.', '_' or "
                "'-', the first a letter or digit",
                field="teacher",
            )

    def _check_kind(self, update: WeightsUpdate, kind: TeacherKind) -> None:
        served = self._teachers.find(update.teacher)
        if served is None and kind == "model":
            raise UnknownTeacher(
                f"no teacher {update.teacher!r} here; a new one must be a LoRA adapter, with its adapter_config",
                field="teacher",
            )
        if served is not None and served.kind != kind:
            raise InvalidRequest(
                f"the kind of {update.teacher!r} is {served.kind}; these are weights of a {kind}", field="teacher"
            )
        if kind == "adapter" and update.ema_decay is not None:
            raise InvalidRequest("ema_decay is for the model's own weights, not for an adapter", field="ema_decay")

    async def _put_adapter(self, teacher: str, version: int, staged: Staged) -> None:
        """Loads the adapter beside what is served, then lets new items to it."""
        async with self._changing:
            self._teachers.check_version(teacher, version)
            if self._teachers.find(teacher) is None and self._teachers.num_adapters >= self._max_adapters:
                raise Conflict(
                    f"{self._teachers.num_adapters} adapters are served, and this server takes {self._max_adapters} "
                    "(--max-adapters); unload one",
                    field="teacher",
                )
            await to_its_end(self._load_adapter(teacher, version, staged))

    async def _load_adapter(self, teacher: str, version: int, staged: Staged) -> None:
        adapter = Adapter(next(_ADAPTER_IDS), staged.folder)
        try:
            await self._engine.load_adapter(adapter)
        except EngineDeadError as error:
            self._died()
            raise EngineFailed(f"the engine is gone and this server is ending: {error}") from error
        except Exception as error:
            raise EngineFailed(f"the engine cannot load this adapter; what was served still is: {error}") from error
        self._staging.keep(staged)
        replaced = self._teachers.put_adapter(teacher, version, adapter)
        _log.info("weights", teacher=teacher, version=version, kind="adapter")
        if replaced is not None:
            self._retire(replaced)

    def _retire(self, weights: Weights) -> None:
        """Unloads an adapter once its last item is done."""
        task = asyncio.create_task(self._unload_unused(weights))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _unload_unused(self, weights: Weights) -> None:
        assert weights.adapter is not None
        await weights.unused.wait()
        try:
            await self._engine.unload_adapter(weights.adapter)
        except Exception as error:  # it is out of service already; all that is lost is memory
            _log.error("adapter not unloaded", error=str(error))
        await self._staging.remove(weights.adapter.folder)

    async def _take_files(self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None) -> None:
        async with self._staging.folder() as folder:
            staged = await self._staging.stage(update, chunks, folder)
            self._check_kind(update, staged.kind)
            if staged.kind == "adapter":
                await self._put_adapter(update.teacher, update.version, staged)
            else:
                await self._load_model(update, staged)

    async def _load_model(self, update: WeightsUpdate, staged: Staged) -> None:
        async with self._model_changing(update):
            if update.ema_decay is not None:
                if self._current is None:
                    raise Conflict(
                        "the weights served came by transfer, and no file has them for a mean; send these without "
                        "ema_decay",
                        field="ema_decay",
                    )
                staged = await self._staging.mean(self._current, staged, update.ema_decay)
            async with self._no_item_in_flight():
                staged.files.check_unchanged()
                load = self._engine.load_weights(staged.files.paths)
                await to_its_end(self._replace_model(update.version, load, staged))

    async def _receive_model(self, update: WeightsUpdate, transfer: WeightsTransfer, until: float) -> None:
        async with self._model_changing(update), self._no_item_in_flight():
            await to_its_end(self._replace_model(update.version, self._receive(update.version, transfer, until), None))

    @asynccontextmanager
    async def _model_changing(self, update: WeightsUpdate) -> AsyncGenerator[None, None]:
        """While no other change is made; items still come and go."""
        async with self._changing:
            self._teachers.check_version(update.teacher, update.version)
            if self._teachers.num_adapters:
                raise Conflict(
                    f"{self._teachers.num_adapters} adapters are served, and each is a difference from the weights "
                    "that it was trained on; unload them first",
                    field="teacher",
                )
            yield

    @asynccontextmanager
    async def _no_item_in_flight(self) -> AsyncGenerator[None, None]:
        async with self._teachers.changing_model():
            await asyncio.gather(*self._retiring)
            yield

    async def _receive(self, version: int, transfer: WeightsTransfer, until: float) -> None:
        """Has the workers take what the sender broadcasts; closes an engine that waits for it for ever."""
        assert isinstance(self._engine, TransferEngine)
        left_s = max(until - asyncio.get_running_loop().time(), 0.0)
        timeout = asyncio.timeout(left_s + GRACE_S)
        try:
            async with timeout:
                await self._engine.receive_weights(transfer, WORKERS_SHARE * left_s)
        except TimeoutError:
            if not timeout.expired():
                raise
            await self._lose(f"weights of version {version} did not come within {left_s:.0f} s, and are waited for")

    async def _replace_model(self, version: int, load: Awaitable[None], staged: Staged | None) -> None:
        """Serves what `load` puts into the engine; `staged` is None where no file has it."""
        try:
            await load
        except WeightsUntouchedError as error:
            raise EngineFailed(
                f"weights of version {version} did not come ({error}); those served before still are"
            ) from error
        except EngineFailed:
            raise
        except Exception as error:
            await self._restore(version, error)
        replaced, self._current = self._current, staged
        if staged is not None:
            self._staging.keep(staged)
        self._teachers.replaced_model(version)
        _log.info("weights", version=version, kind="model")
        if replaced is not None:
            await self._staging.remove(replaced.folder)

    async def _restore(self, version: int, error: Exception) -> NoReturn:
        """Loads the weights served before again, and raises what happened."""
        what = f"weights of version {version} could not be loaded ({error})"
        if self._current is None:
            await self._lose(f"{what}, and no file has those served before")
        try:
            self._current.files.check_unchanged()
            await self._engine.load_weights(self._current.files.paths)
        except Exception as second:
            await self._lose(f"{what}, and those served before could not be restored ({second})")
        raise EngineFailed(f"{what}; those served before were restored") from error

    async def _lose(self, what: str) -> NoReturn:
        """Closes an engine whose weights nobody knows."""
        _log.error("weights lost", reason=what)
        await self._engine.close()
        self._died()
        raise EngineFailed(f"{what}: the engine was closed and this server is ending")

    def _found(self, teacher: str) -> ServedTeacher:
        served = self._teachers.find(teacher)
        if served is None:
            names = ", ".join(teacher.name for teacher in self._teachers.served)
            raise UnknownTeacher(f"no teacher {teacher[:80]!r} here; served: {names}", field="teacher")
        return served
