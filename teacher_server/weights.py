"""Changes what is served while it is served: new weights for the model, LoRA adapters in, replaced and out.

Files are checked against the model's own before anything is touched. The model's weights change in place, between
items: those in flight finish on the old ones, later ones wait. If loading fails, the weights served before are loaded
again from their files; if that fails too, the engine is closed, for nobody knows what it would answer.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from protos.errors import Conflict, DeadlineExceeded, EngineFailed, InvalidRequest, PermissionDenied, UnknownTeacher
from protos.records import ServedTeacher, TeacherKind, WeightsUpdate
from teacher_server.adapters import CONFIG_FILE, TENSORS_FILE, check_adapter
from teacher_server.engines.base import Adapter, EngineDeadError, WeightsEngine
from teacher_server.teachers import FIRST_VERSION, Teachers, Weights
from teacher_server.tensor_files import TensorFiles, blend, check_fits_model, max_bytes

MAX_CONFIG_BYTES = 2**20
"""Of an adapter_config.json; those that PEFT writes have a few kilobytes."""

NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a teacher that comes over the network may be called: it goes into URLs, logs and metrics."""

_ADAPTER_IDS = itertools.count(1)

_Result = TypeVar("_Result")

_log = structlog.get_logger()


@dataclass(frozen=True)
class ServedModel:
    """The model's own files, against which others are checked.

    Attributes:
        tied: tensors that the model takes from others, which weights may leave out.
    """

    files: TensorFiles
    tied: frozenset[str]

    @classmethod
    def find(cls, model: str, revision: str | None) -> ServedModel:
        """The safetensors files of a folder, or of a hub name that the engine has downloaded.

        Raises:
            InvalidRequest: it has none.
        """
        from huggingface_hub import snapshot_download
        from transformers import AutoConfig

        folder = Path(model).expanduser()
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.json"]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
        config = AutoConfig.from_pretrained(folder).get_text_config()
        tied = frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
        return cls(TensorFiles.find(folder), tied)


@dataclass(frozen=True)
class _Staged:
    """Checked weights on this server's disk; `folder` is removed with them."""

    kind: TeacherKind
    files: TensorFiles
    folder: Path


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
        self._current = _Staged("model", model.files, spool / "model")
        self._spool = spool
        self._root = None if root is None else root.resolve()
        self._max_adapters = max_adapters
        self._max_lora_rank = max_lora_rank
        self._died = died
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._folders_in_use: set[Path] = set()

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """See TeacherAdmin."""
        async with _deadline(timeout_s):
            self._check(update)
            self._teachers.check_version(update.teacher, update.version)
            async with self._staging() as folder:
                staged = await self._stage(update, chunks, folder)
                self._check_kind(update, staged.kind)
                if staged.kind == "adapter":
                    await self._put_adapter(update.teacher, update.version, staged)
                else:
                    await self._replace_model(update, staged)
        return self._found(update.teacher)

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """See TeacherAdmin."""
        async with _deadline(timeout_s), self._changing:
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
        async with self._staging() as folder:
            staged = await asyncio.to_thread(self._stage_adapter_folder, path, folder)
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

    @asynccontextmanager
    async def _staging(self) -> AsyncGenerator[Path, None]:
        """A new folder for one update, removed unless what is in it came into use."""
        folder = Path(tempfile.mkdtemp(dir=self._spool))
        try:
            yield folder
        except OSError as error:
            raise EngineFailed(f"the server cannot keep the weights: {error}") from error
        finally:
            if folder not in self._folders_in_use:
                shutil.rmtree(folder, ignore_errors=True)

    async def _stage(self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None, folder: Path) -> _Staged:
        """The update's weights, received or found, and checked."""
        if not update.path:
            received = folder / TENSORS_FILE
            await self._receive(chunks, received)
            if update.adapter_config:
                return await asyncio.to_thread(self._stage_adapter, update.adapter_config, received, folder)
            return await asyncio.to_thread(self._stage_model, TensorFiles.find(received), folder)
        async for _ in chunks or _nothing():
            raise InvalidRequest("bytes follow although a path is given; send one of them", field="path")
        return await asyncio.to_thread(self._stage_path, update.path, folder)

    async def _receive(self, chunks: AsyncIterable[bytes] | None, file: Path) -> None:
        limit = max_bytes(self._model.files.specs)
        num_bytes = 0
        with file.open("xb") as out:
            async for chunk in chunks or _nothing():
                num_bytes += len(chunk)
                if num_bytes > limit:
                    raise InvalidRequest(
                        f"the weights have more than {limit} bytes, which this model's in float32 have at most"
                    )
                await asyncio.to_thread(out.write, chunk)
        if not num_bytes:
            raise InvalidRequest("no bytes follow the header; send one safetensors file, or a path", field="path")

    def _confined(self, text: str) -> Path:
        """The path below the weights root, links followed; relative paths start there."""
        if self._root is None:
            raise PermissionDenied(
                "paths are not read by this server; send the bytes, or start it with --weights-root", field="path"
            )
        path = (self._root / text).resolve()
        if not path.is_relative_to(self._root):
            raise PermissionDenied(f"{text[:200]!r} is not below the weights root", field="path")
        if not path.exists():
            raise InvalidRequest(f"there is no {text[:200]!r} below the weights root", field="path")
        return path

    def _stage_path(self, text: str, folder: Path) -> _Staged:
        """What lies at that path: every file of it below the weights root too, for a file may be a link."""
        path = self._confined(text)
        if (path / CONFIG_FILE).is_file():
            for name in (CONFIG_FILE, TENSORS_FILE):
                self._confined(str(path / name))
            return self._stage_adapter_folder(path, folder)
        files = TensorFiles.find(path)
        for file in files.paths:
            self._confined(str(file))
        return self._stage_model(files, folder)

    def _stage_model(self, files: TensorFiles, folder: Path) -> _Staged:
        check_fits_model(files.specs, self._model.files.specs, self._model.tied)
        return _Staged("model", files, folder)

    def _stage_adapter_folder(self, path: Path, folder: Path) -> _Staged:
        """A private copy: engines read adapters again when they need them, and the owner of `path` may change it."""
        for name in (CONFIG_FILE, TENSORS_FILE):
            if not (path / name).is_file():
                raise InvalidRequest(f"{path} has no {name}; a LoRA adapter is a folder that PEFT wrote", field="path")
        config, tensors = (path / CONFIG_FILE), (path / TENSORS_FILE)
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidRequest(f"{config} has more than {MAX_CONFIG_BYTES} bytes", field="path")
        copy = Path(shutil.copyfile(tensors, folder / TENSORS_FILE))
        return self._stage_adapter(config.read_text(), copy, folder)

    def _stage_adapter(self, config: str, tensors: Path, folder: Path) -> _Staged:
        files = TensorFiles.find(tensors)
        checked = check_adapter(config, files.specs, self._model.files.specs, self._max_lora_rank)
        (folder / CONFIG_FILE).write_text(checked)
        return _Staged("adapter", files, folder)

    async def _put_adapter(self, teacher: str, version: int, staged: _Staged) -> None:
        """Loads the adapter beside what is served, then lets new items to it."""
        async with self._changing:
            self._teachers.check_version(teacher, version)
            if self._teachers.find(teacher) is None and self._teachers.num_adapters >= self._max_adapters:
                raise Conflict(
                    f"{self._teachers.num_adapters} adapters are served, and this server takes {self._max_adapters} "
                    "(--max-adapters); unload one",
                    field="teacher",
                )
            await _to_its_end(self._load_adapter(teacher, version, staged))

    async def _load_adapter(self, teacher: str, version: int, staged: _Staged) -> None:
        adapter = Adapter(next(_ADAPTER_IDS), staged.folder)
        try:
            await self._engine.load_adapter(adapter)
        except EngineDeadError as error:
            self._died()
            raise EngineFailed(f"the engine is gone and this server is ending: {error}") from error
        except Exception as error:
            raise EngineFailed(f"the engine cannot load this adapter; what was served still is: {error}") from error
        self._folders_in_use.add(staged.folder)
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
        await self._remove(weights.adapter.folder)

    async def _replace_model(self, update: WeightsUpdate, staged: _Staged) -> None:
        async with self._changing:
            self._teachers.check_version(update.teacher, update.version)
            if self._teachers.num_adapters:
                raise Conflict(
                    f"{self._teachers.num_adapters} adapters are served, and each is a difference from the weights "
                    "that it was trained on; unload them first",
                    field="teacher",
                )
            if update.ema_decay is not None:
                self._current.files.check_unchanged()
                file = staged.folder / "mean.safetensors"
                mean = await asyncio.to_thread(blend, self._current.files, staged.files, update.ema_decay, file)
                (staged.folder / TENSORS_FILE).unlink(missing_ok=True)
                staged = _Staged("model", mean, staged.folder)
            async with self._teachers.changing_model():
                await asyncio.gather(*self._retiring)
                await _to_its_end(self._load_model(update.version, staged))

    async def _load_model(self, version: int, staged: _Staged) -> None:
        staged.files.check_unchanged()
        try:
            await self._engine.load_weights(staged.files.paths)
        except Exception as error:
            await self._restore(version, error)
        replaced, self._current = self._current, staged
        self._folders_in_use.add(staged.folder)
        self._teachers.replaced_model(version)
        _log.info("weights", version=version, kind="model")
        await self._remove(replaced.folder)

    async def _restore(self, version: int, error: Exception) -> None:
        """Loads the weights served before again, and raises what happened."""
        try:
            self._current.files.check_unchanged()
            await self._engine.load_weights(self._current.files.paths)
        except Exception as second:
            _log.exception("weights lost")
            await self._engine.close()
            self._died()
            raise EngineFailed(
                f"weights of version {version} could not be loaded ({error}), and those served before could not be "
                f"restored ({second}): the engine was closed and this server is ending"
            ) from error
        raise EngineFailed(
            f"weights of version {version} could not be loaded ({error}); those served before were restored"
        ) from error

    async def _remove(self, folder: Path) -> None:
        self._folders_in_use.discard(folder)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _found(self, teacher: str) -> ServedTeacher:
        served = self._teachers.find(teacher)
        if served is None:
            names = ", ".join(teacher.name for teacher in self._teachers.served)
            raise UnknownTeacher(f"no teacher {teacher[:80]!r} here; served: {names}", field="teacher")
        return served


@asynccontextmanager
async def _deadline(timeout_s: float | None) -> AsyncGenerator[None, None]:
    timeout = asyncio.timeout(timeout_s)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise DeadlineExceeded(
            f"the change was not done within {timeout_s:g} s; see GetInfo for what is served"
        ) from None


async def _to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Awaits `work` even when the caller is cancelled meanwhile: half-loaded weights must not be left behind."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled() and (error := task.exception()):
            _log.error("change failed", error=str(error))
        raise cancelled
    return task.result()


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield
