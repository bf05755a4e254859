"""How fast the engine takes work off the queue: what a refused caller's retry-after is computed from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WINDOW_S = 10.0
"""The time constant of the average: several batches of a slow engine, and soon after a change of load."""


class DrainRate:
    """Tokens finished per second, averaged with exponentially falling weights since the queue last began to fill.

    Time without a queue is left out: an idle engine says nothing of how fast a busy one is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forgets all; the queue begins to fill now."""
        self._started = self._updated = self._clock()
        self._weighted_tokens = 0.0

    def add(self, num_tokens: int) -> None:
        """Counts tokens finished now."""
        self._decay()
        self._weighted_tokens += num_tokens

    def tokens_per_s(self) -> float | None:
        """The rate; None while nothing has been measured."""
        self._decay()
        seconds = WINDOW_S * -math.expm1(-(self._updated - self._started) / WINDOW_S)
        return self._weighted_tokens / seconds if self._weighted_tokens and seconds else None

    def _decay(self) -> None:
        now = self._clock()
        self._weighted_tokens *= math.exp((self._updated - now) / WINDOW_S)
        self._updated = now
