"""When and how often to try again: a wait with full jitter, and a budget that keeps retries from feeding an outage."""

from __future__ import annotations

from random import Random

BURST_S = 10.0
"""Seconds of `min_retries_per_s` that may be spent at once; Finagle's window is as long."""


def full_jitter(num_failures: int, base_s: float, cap_s: float, random: Random) -> float:
    """Seconds to wait after the `num_failures`-th failure: uniform in [0, min(cap, base * 2 ** (num_failures - 1))].

    "Full jitter" of M. Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015): of the schemes compared
    there, the one with the fewest calls until all clients of a recovering server are served.
    """
    return random.uniform(0.0, min(cap_s, base_s * 2.0 ** (num_failures - 1)))


class RetryBudget:
    """Retries bounded by a share of what is sent, plus a floor for quiet times.

    As Finagle's `RetryBudget` (com.twitter.finagle.service) and "Site Reliability Engineering" (2016, chapter 22, retry
    budgets): during an outage the load grows by the ratio, not by the number of attempts.

    Args:
        ratio: retries earned by one first attempt.
        min_per_s: retries earned by one second.
        now: seconds, of the clock that the calls use.
    """

    def __init__(self, ratio: float, min_per_s: float, now: float) -> None:
        self._ratio = ratio
        self._min_per_s = min_per_s
        # Room for one retry at least: a pool whose only income is the ratio could otherwise never save one up.
        self._capacity = max(1.0, BURST_S * min_per_s)
        self._balance = BURST_S * min_per_s
        self._at = now

    def deposit(self) -> None:
        """A first attempt is sent."""
        self._balance = min(self._capacity, self._balance + self._ratio)

    def withdraw(self, now: float) -> bool:
        """Whether one retry may be sent; if so, it is paid."""
        self._balance = min(self._capacity, self._balance + (now - self._at) * self._min_per_s)
        self._at = now
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
