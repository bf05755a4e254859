"""Step s + 1's data on its way while step s is learnt: what may be begun ahead, and how stale it is then.

Sampling stays in the training thread, where the weights do not change under it; what goes on beside the learner is
scoring. Nothing is begun ahead across a checkpoint: at each one the queue is empty, so that a resumed run begins the
same steps from the same weights as the unbroken one, bit for bit, and a checkpoint holds weights and optimiser alone.
Therefore, above a staleness of 0, `checkpoint.every_steps` is part of a run's numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Begun(Protocol):
    """One step's data in the making."""

    def cancel(self) -> object:
        """Gives up what is not there yet."""
        ...


T = TypeVar("T", bound=Begun)


@dataclass(frozen=True)
class _Entry(Generic[T]):
    step: int
    begun_at: int
    begun: T


class Pipeline(Generic[T]):
    """Begins each step's data at most `max_staleness` optimiser steps before it is learnt from.

    Args:
        begin: begins the data of a step with the weights of now.
        max_staleness: 0 begins each step when it is asked for.
        num_steps: of the whole run.
        checkpoint_every: steps between two checkpoints.
    """

    def __init__(self, begin: Callable[[int], T], *, max_staleness: int, num_steps: int, checkpoint_every: int) -> None:
        self._begin = begin
        self._max_staleness = max_staleness
        self._num_steps = num_steps
        self._checkpoint_every = checkpoint_every
        self._queue: deque[_Entry[T]] = deque()
        self._taken: T | None = None

    def take(self, step: int) -> tuple[T, int]:
        """Step s's data in the making, and its staleness: optimiser steps from the weights that wrote it to those that
        learn now.

        Steps are asked for in order; after a step back, what was begun is given up.
        """
        if self._queue and self._queue[0].step != step:
            self.give_up()
        first = self._queue[-1].step + 1 if self._queue else step
        for ahead in range(first, min(step + self._max_staleness, self._last_before_checkpoint(step)) + 1):
            self._queue.append(_Entry(ahead, step, self._begin(ahead)))
        entry = self._queue.popleft()
        self._taken = entry.begun
        return entry.begun, step - entry.begun_at

    def give_up(self) -> None:
        """Gives up what was begun ahead, and what is still missing of the step taken last, which may be begun anew."""
        if self._taken is not None:
            self._taken.cancel()
        while self._queue:
            self._queue.popleft().begun.cancel()

    def _last_before_checkpoint(self, step: int) -> int:
        return min((step // self._checkpoint_every + 1) * self._checkpoint_every, self._num_steps) - 1
