"""Weights on their way in: received or found, checked against the model, and kept on this server's disk while in use.

Nothing here touches the engine: what is wrong with an update's files is said before anything is changed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from protos.errors import EngineFailed, InvalidRequest, PermissionDenied
from protos.records import TeacherKind, WeightsUpdate
from teacher_server.adapters import CONFIG_FILE, TENSORS_FILE, check_adapter
from teacher_server.served_model import ServedModel
from teacher_server.tensor_files import TensorFiles, blend, check_fits_model, max_bytes

MAX_CONFIG_BYTES = 2**20
"""Of an adapter_config.json; those that PEFT writes have a few kilobytes."""

MEAN_FILE = "mean.safetensors"


@dataclass(frozen=True)
class Staged:
    """Checked weights on this server's disk; `folder` is removed with them."""

    kind: TeacherKind
    files: TensorFiles
    folder: Path


class Staging:
    """The folder where updates become `Staged` weights.

    Args:
        model: what is served, which all weights must fit.
        spool: a folder of this server's own; empty at the start.
        root: paths in updates must lie below it; None takes no paths.
        max_lora_rank: of adapters.
    """

    def __init__(self, model: ServedModel, spool: Path, root: Path | None, max_lora_rank: int) -> None:
        self._model = model
        self._spool = spool
        self._root = None if root is None else root.resolve()
        self._max_lora_rank = max_lora_rank
        self._in_use: set[Path] = set()

    @property
    def of_the_start(self) -> Staged:
        """The weights that the server starts with, where they lie."""
        return Staged("model", self._model.files, self._spool / "model")

    @asynccontextmanager
    async def folder(self) -> AsyncGenerator[Path, None]:
        """A new folder for one update, removed unless what is in it came into use.

        Raises:
            EngineFailed: in the block, the disk failed.
        """
        folder = Path(tempfile.mkdtemp(dir=self._spool))
        try:
            yield folder
        except OSError as error:
            raise EngineFailed(f"the server cannot keep the weights: {error}") from error
        finally:
            if folder not in self._in_use:
                shutil.rmtree(folder, ignore_errors=True)

    def keep(self, staged: Staged) -> None:
        """These weights are served now; their folder stays until it is removed."""
        self._in_use.add(staged.folder)

    async def remove(self, folder: Path) -> None:
        """What lay there is no longer served."""
        self._in_use.discard(folder)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def stage(self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None, folder: Path) -> Staged:
        """The update's weights, received or found, and checked.

        Raises:
            InvalidRequest: they do not fit the model, or there are none, or two sources of them.
            PermissionDenied: the path is not one to be read.
        """
        if not update.path:
            received = folder / TENSORS_FILE
            await self._receive(chunks, received)
            if update.adapter_config:
                return await asyncio.to_thread(self._adapter, update.adapter_config, received, folder)
            return await asyncio.to_thread(self._of_model, TensorFiles.find(received), folder)
        await refuse_bytes(chunks, "path")
        return await asyncio.to_thread(self._at_path, update.path, folder)

    def adapter_folder(self, path: Path, folder: Path) -> Staged:
        """A private copy: engines read adapters again when they need them, and the owner of `path` may change it.

        Raises:
            InvalidRequest: the folder at `path` holds no adapter for this model.
        """
        for name in (CONFIG_FILE, TENSORS_FILE):
            if not (path / name).is_file():
                raise InvalidRequest(f"{path} has no {name}; a LoRA adapter is a folder that PEFT wrote", field="path")
        config, tensors = (path / CONFIG_FILE), (path / TENSORS_FILE)
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidRequest(f"{config} has more than {MAX_CONFIG_BYTES} bytes", field="path")
        copy = Path(shutil.copyfile(tensors, folder / TENSORS_FILE))
        return self._adapter(config.read_text(), copy, folder)

    async def mean(self, current: Staged, incoming: Staged, decay: float) -> Staged:
        """See tensor_files.blend; it takes the place of what came in."""
        current.files.check_unchanged()
        mean = await asyncio.to_thread(blend, current.files, incoming.files, decay, incoming.folder / MEAN_FILE)
        (incoming.folder / TENSORS_FILE).unlink(missing_ok=True)
        return Staged("model", mean, incoming.folder)

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

    def _at_path(self, text: str, folder: Path) -> Staged:
        """What lies at that path: every file of it below the weights root too, for a file may be a link."""
        path = self._confined(text)
        if (path / CONFIG_FILE).is_file():
            for name in (CONFIG_FILE, TENSORS_FILE):
                self._confined(str(path / name))
            return self.adapter_folder(path, folder)
        files = TensorFiles.find(path)
        for file in files.paths:
            self._confined(str(file))
        return self._of_model(files, folder)

    def _of_model(self, files: TensorFiles, folder: Path) -> Staged:
        check_fits_model(files.specs, self._model.files.specs, self._model.tied)
        return Staged("model", files, folder)

    def _adapter(self, config: str, tensors: Path, folder: Path) -> Staged:
        files = TensorFiles.find(tensors)
        checked = check_adapter(config, files.specs, self._model.files.specs, self._max_lora_rank)
        (folder / CONFIG_FILE).write_text(checked)
        return Staged("adapter", files, folder)


async def refuse_bytes(chunks: AsyncIterable[bytes] | None, field: str) -> None:
    """Raises InvalidRequest where bytes follow an update whose weights come from elsewhere, which `field` says."""
    async for _ in chunks or _nothing():
        raise InvalidRequest(f"bytes follow although a {field} is given; send one of them", field=field)


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield
