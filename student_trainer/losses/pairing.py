"""When a student and a teacher array may be compared: same shape, and no teacher log-prob missing."""

from __future__ import annotations

from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming both, when two tensors differ in shape; nothing is ever broadcast."""
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {first} has {tuple(expected.shape)}")


def check_present(logp: Tensor, used: Tensor | None = None, *, whose: str = "teacher") -> None:
    """Raises ValueError when a log-prob is missing (NaN) where `used` (bool, default everywhere) is true."""
    missing = logp.isnan() if used is None else logp.isnan() & used
    if missing.any():
        total = missing.numel() if used is None else int(used.sum())
        first = tuple(missing.nonzero()[0].tolist())
        raise ValueError(f"{int(missing.sum())} of {total} {whose} log-probs are missing (NaN), the first at {first}")
