"""A circuit breaker: whether a replica that kept failing may be tried again; pure, the time is given.

Closed, open, half-open as in M. Nygard, "Release It!" (2nd ed., 2018, chapter 5): consecutive failures open it; when it
has cooled down and a probe was answered it is half-open, and lets one request through, which closes or opens it again.
"""

from __future__ import annotations

from protos.pool.stats import BreakerState


class Breaker:
    """The breaker of one replica.

    Attributes:
        state: "closed" (in use), "open" (out of use), or "half_open" (one request at a time, on trial).
    """

    def __init__(self, failures_to_open: int, cool_down_s: float) -> None:
        self.state: BreakerState = "closed"
        self._failures_to_open = failures_to_open
        self._cool_down_s = cool_down_s
        self._num_failures = 0
        self._opened_at = 0.0
        self._on_trial = False

    @property
    def allows(self) -> bool:
        """Whether a request may be sent now."""
        return self.state == "closed" or (self.state == "half_open" and not self._on_trial)

    def begin(self) -> None:
        """A request is sent."""
        self._on_trial = True

    def end(self) -> None:
        """A request has ended, whatever came of it."""
        self._on_trial = False

    def succeeded(self) -> None:
        """A request was answered."""
        self.state = "closed"
        self._num_failures = 0

    def failed(self, now: float) -> None:
        """A request failed at `now`, in seconds of any one clock."""
        self._num_failures += 1
        if self.state == "half_open" or self._num_failures >= self._failures_to_open:
            self.state = "open"
            self._opened_at = now

    def probed(self, now: float) -> None:
        """A probe was answered at `now`."""
        if self.state == "open" and now - self._opened_at >= self._cool_down_s:
            self.state = "half_open"
