"""Bytes of the wire <-> numpy arrays: the only place that knows byte order and dtype.

Decoded arrays are read-only views of the message where the machine is little-endian.
"""

from __future__ import annotations

import math

import numpy as np

from protos.errors import InvalidRequest
from protos.records import Float32, Int32

INT = np.dtype("<i4")
FLOAT = np.dtype("<f4")
HALF = np.dtype("<f2")
_INT_RANGE = np.iinfo(np.int32)


def ids_bytes(ids: Int32, field: str, *, ndim: int = 1) -> bytes:
    """The ids as little-endian int32; InvalidRequest where they are none, or not of `ndim` dimensions."""
    array = np.asarray(ids)
    if array.ndim != ndim or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidRequest(
            f"an array of {array.dtype} with shape {list(array.shape)}; it must be int32 with {ndim} dimension(s)",
            field=field,
        )
    if array.size and not (_INT_RANGE.min <= array.min() and array.max() <= _INT_RANGE.max):
        raise InvalidRequest(f"ids from {array.min()} to {array.max()}; they must fit in int32", field=field)
    return np.ascontiguousarray(array, INT).tobytes()


def ids_of(data: bytes, field: str) -> Int32:
    """int32 [N]; InvalidRequest where the bytes are not whole ids."""
    if len(data) % INT.itemsize:
        raise InvalidRequest(f"{len(data)} bytes are not a whole number of 4-byte ids", field=field)
    return array_of(data, INT, (len(data) // INT.itemsize,), field)


def float_bytes(values: Float32, dtype: np.dtype = FLOAT) -> bytes:
    """The values as little-endian bytes of that type."""
    return np.ascontiguousarray(values, dtype).tobytes()


def array_of(data: bytes, dtype: np.dtype, shape: tuple[int, ...], field: str) -> np.ndarray:
    """A view of `data` as an array of that shape; InvalidRequest when the length is another."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or len(data) != num_bytes:
        raise InvalidRequest(
            f"{len(data)} bytes; {dtype.name} of shape {list(shape)} is {num_bytes} bytes", field=field
        )
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def check_candidates(candidate_ids: Int32, num_tokens: int, field: str) -> None:
    """Raises InvalidRequest unless the array is [T, M], or [1, M], for a completion of `num_tokens` T."""
    if candidate_ids.ndim != 2 or len(candidate_ids) not in (1, num_tokens):
        raise InvalidRequest(
            f"candidate_ids has shape {list(candidate_ids.shape)}; the completion has {num_tokens} tokens, "
            f"so it must be [{num_tokens}, M], or [1, M] for the same ids at every position",
            field=field,
        )
