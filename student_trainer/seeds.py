"""Where randomness comes from: every draw is a function of the run's seed and of what is drawn, never of what came
before, so that a resumed run draws what the unbroken run would have drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from student_trainer.distributed import share

T = TypeVar("T")

# The purposes of a draw: their numbers keep the streams apart.
PROBLEMS, ROLLOUTS, DROPOUT, ADAPTER, TRACES, WRITERS, FURTHER = range(7)


def derive_seed(seed: int, purpose: int, index: int) -> int:
    """A 63-bit seed for the `index`-th draw of one purpose (NumPy's SeedSequence)."""
    state = np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def further_seed(seed: int, step: int) -> int:
    """The seed of what step s draws beyond its own problems: a stream for each step, for `pick_at` and `seeds_at`."""
    return derive_seed(seed, FURTHER, step)


def pick(items: Sequence[T], num_items: int, step: int, seed: int) -> list[T]:
    """This rank's share of items `step * num_items` and the next of an endless stream of shuffled epochs, without
    replacement in each."""
    return pick_at(items, places_of(step, num_items), seed)


def rollout_seeds(seed: int, step: int, num_problems: int) -> list[int]:
    """The seeds of the problems that `pick` gives at that step, one each: a function of their places in its stream."""
    return seeds_at(places_of(step, num_problems), seed)


def places_of(step: int, num_items: int) -> Sequence[int]:
    """This rank's share of the places of a step's items in the stream."""
    return share(range(step * num_items, (step + 1) * num_items))


def pick_at(items: Sequence[T], places: Sequence[int], seed: int) -> list[T]:
    """The items at those places of an endless stream of shuffled epochs."""
    orders = {
        epoch: np.random.default_rng(derive_seed(seed, PROBLEMS, epoch)).permutation(len(items))
        for epoch in {place // len(items) for place in places}
    }
    return [items[int(orders[place // len(items)][place % len(items)])] for place in places]


def seeds_at(places: Sequence[int], seed: int) -> list[int]:
    """The seeds of the problems at those places, one each."""
    return [derive_seed(seed, ROLLOUTS, place) for place in places]
