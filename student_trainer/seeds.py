"""Where randomness comes from: every draw is a function of the run's seed and of what is drawn, never of what came
before, so that a resumed run draws what the unbroken run would have drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from student_trainer.distributed import share

T = TypeVar("T")

# The purposes of a draw: their numbers keep the streams apart.
PROBLEMS, ROLLOUTS, DROPOUT, ADAPTER = range(4)


def derive_seed(seed: int, purpose: int, index: int) -> int:
    """A 63-bit seed for the `index`-th draw of one purpose (NumPy's SeedSequence)."""
    state = np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def pick(items: Sequence[T], num_items: int, step: int, seed: int) -> list[T]:
    """This rank's share of items `step * num_items` and the next of an endless stream of shuffled epochs, without
    replacement in each."""
    positions = share(range(step * num_items, (step + 1) * num_items))
    orders = {
        epoch: np.random.default_rng(derive_seed(seed, PROBLEMS, epoch)).permutation(len(items))
        for epoch in {position // len(items) for position in positions}
    }
    return [items[int(orders[position // len(items)][position % len(items)])] for position in positions]


def rollout_seeds(seed: int, step: int, num_problems: int) -> list[int]:
    """The seeds of the problems that `pick` gives at that step, one each: a function of their places in its stream."""
    places = share(range(step * num_problems, (step + 1) * num_problems))
    return [derive_seed(seed, ROLLOUTS, place) for place in places]
