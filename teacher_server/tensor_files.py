"""safetensors files: what they hold, whether a model can take it, and the weighted mean of two sets of them.

Only safetensors, never a pickle: a header of JSON and raw bytes, which cannot run anything
(https://huggingface.co/docs/safetensors). No more than one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from protos.errors import InvalidRequest

FLOATS = ("F32", "BF16", "F16")
"""What floating-point weights may come as, whatever the model's own type: engines convert them to theirs."""

MAX_HEADER_BYTES = 100_000_000
"""Of one safetensors file, by the format's own definition."""

SUFFIX = ".safetensors"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a header; `dtype` by its name in the format, for example "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TensorFiles:
    """A set of safetensors files as they were when they were found.

    Attributes:
        paths: the files.
        specs: every tensor by name.
        stamps: what shows that a file was replaced or written to since.
    """

    paths: tuple[Path, ...]
    specs: dict[str, TensorSpec]
    stamps: tuple[tuple[int, int, int], ...]

    @classmethod
    def find(cls, path: Path) -> TensorFiles:
        """The checkpoint at `path`: one file, or a folder as transformers writes it, sharded or not.

        Raises:
            InvalidRequest: there is none, or a file is broken.
        """
        paths = tuple(_checkpoint(path))
        stamps = tuple(_stamp(file) for file in paths)
        specs: dict[str, TensorSpec] = {}
        for file in paths:
            specs |= read_specs(file)
        return cls(paths, specs, stamps)

    def check_unchanged(self) -> None:
        """Raises InvalidRequest when a file is not the one that was found."""
        for file, stamp in zip(self.paths, self.stamps, strict=True):
            if not file.exists() or _stamp(file) != stamp:
                raise InvalidRequest(f"{file} was changed or removed after it was checked; leave it as it is")


def read_specs(file: Path) -> dict[str, TensorSpec]:
    """Every tensor in one file's header; the library refuses sizes and offsets that do not fit the file."""
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            return {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InvalidRequest(f"{file.name} is not a whole safetensors file: {error}") from error


def check_fits_model(incoming: dict[str, TensorSpec], model: dict[str, TensorSpec], tied: frozenset[str]) -> None:
    """Raises InvalidRequest naming the first tensor that is missing, unknown, or of another shape or type.

    Args:
        tied: tensors that the model takes from others, which may be left out.
    """
    for name in sorted(model.keys() | incoming.keys()):
        if name not in incoming:
            if name in tied:
                continue
            raise InvalidRequest(f"{name} is missing; the model has it as {model[name]}")
        if name not in model:
            raise InvalidRequest(f"{name} is not a tensor of the model; leave it out")
        got, own = incoming[name], model[name]
        same_type = got.dtype == own.dtype or (got.dtype in FLOATS and own.dtype in FLOATS)
        if got.shape != own.shape or not same_type:
            raise InvalidRequest(f"{name} is {got}; the model has it as {own}")


def max_bytes(model: dict[str, TensorSpec]) -> int:
    """The size of a file that holds the model in float32, behind the longest header: weights for it are never more."""
    return MAX_HEADER_BYTES + 4 * sum(math.prod(spec.shape) for spec in model.values())


def blend(current: TensorFiles, incoming: TensorFiles, decay: float, file: Path) -> TensorFiles:
    """Writes decay · current + (1 - decay) · incoming, every tensor in float32, to one new file.

    Raises:
        InvalidRequest: a tensor is not of floating point.
    """
    import torch

    names = sorted(current.specs.keys() & incoming.specs.keys())
    for name in names:
        if not {current.specs[name].dtype, incoming.specs[name].dtype} <= {*FLOATS}:
            raise InvalidRequest(
                f"{name} is {incoming.specs[name]}; a mean needs {', '.join(FLOATS)}", field="ema_decay"
            )
    with ExitStack() as opened, file.open("xb") as out:
        ours, theirs = _readers(opened, current), _readers(opened, incoming)
        _write_header(out, {name: current.specs[name].shape for name in names})
        for name in names:
            mean = ours[name].get_tensor(name).to(torch.float32) * decay
            mean.add_(theirs[name].get_tensor(name).to(torch.float32), alpha=1 - decay)
            out.write(memoryview(mean.contiguous().numpy().reshape(-1)).cast("B"))
    return TensorFiles.find(file)


def _write_header(out: IO[bytes], shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors header of float32 tensors in this order, whose bytes follow; the library writes whole files."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _readers(opened: ExitStack, files: TensorFiles) -> dict[str, Any]:
    """The open file of every tensor."""
    readers: dict[str, Any] = {}
    for path in files.paths:
        reader = opened.enter_context(safe_open(path, framework="pt"))
        readers |= dict.fromkeys(reader.keys(), reader)
    return readers


def _checkpoint(path: Path) -> Iterator[Path]:
    if path.is_file() and path.suffix == SUFFIX:
        yield path
    elif (path / INDEX_FILE).is_file():
        for name in _shards(path / INDEX_FILE):
            if not (path / name).is_file():
                raise InvalidRequest(f"{INDEX_FILE} names {name!r}, which is not a file beside it")
            yield path / name
    elif (path / SINGLE_FILE).is_file():
        yield path / SINGLE_FILE
    else:
        raise InvalidRequest(f"{path} is neither a {SUFFIX} file nor a folder with {SINGLE_FILE} or {INDEX_FILE}")


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        plain = all(name == Path(name).name and name.endswith(SUFFIX) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{index.name} is not an index of shards: {error!r}") from error
    if not plain:
        raise InvalidRequest(f"{index.name} must name {SUFFIX} files beside it")
    return sorted(names)


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
