"""One metric over the steps of a run, and its running median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from student_trainer.run_folder import Row

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

MIN_SMOOTHED = 10
"""Fewer values are read one by one: a median would hide more than it shows."""

MAX_WINDOW = 51
"""Of a running median: longer ones blur what happened."""


@dataclass(frozen=True)
class Series:
    """A metric's N values.

    Attributes:
        steps: int [N], rising; steps that did not log the metric are absent.
        values: float [N]; a value that was logged as NaN or infinite stays so.
    """

    steps: Int64
    values: Float64

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_not_finite(self) -> int:
        """How many values are NaN or infinite."""
        return int((~np.isfinite(self.values)).sum())


def series_of(rows: Sequence[Row], key: str) -> Series:
    """The metric `key` at the steps that logged it."""
    logged = [(row["step"], row[key]) for row in rows if key in row]
    return Series(np.array([step for step, _ in logged], np.int64), np.array([value for _, value in logged], float))


def window_of(num_values: int) -> int:
    """The running median's window for that many values: odd, about a twentieth of them; 1 smooths nothing."""
    return min(MAX_WINDOW, max(5, num_values // 20) | 1) if num_values >= MIN_SMOOTHED else 1


def running_median(values: Float64, window: int) -> Float64:
    """The median of the `window` (odd) values around each of N values, of fewer near the ends.

    A value that is not finite counts for nothing; a window without a finite value gives NaN.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    around = sliding_window_view(np.pad(finite, window // 2, constant_values=np.nan), window)
    medians = np.full(len(values), np.nan)
    has_value = np.isfinite(around).any(-1)
    medians[has_value] = np.nanmedian(around[has_value], axis=-1)
    return medians
