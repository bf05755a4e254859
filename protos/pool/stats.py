"""What a pool has done and how its replicas are, as records for a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True)
class ReplicaStats:
    """One replica.

    Attributes:
        breaker: the state of its circuit breaker.
        refusal: why it gets no work whatever the breaker says; "" while it may.
        tokens_in_flight: of this pool, estimated for chats.
        num_sent: parts sent to it, retries and hedges among them.
        num_failures: parts that broke off, came back damaged, or failed in the engine.
        num_stalls: parts given up because the replica fell silent.
    """

    url: str
    breaker: BreakerState
    refusal: str
    tokens_in_flight: int
    num_sent: int
    num_failures: int
    num_stalls: int


@dataclass(frozen=True)
class PoolStats:
    """A pool since it was made.

    Attributes:
        num_requests: calls of score and generate.
        num_parts: parts those were split into.
        num_retries, num_hedges: parts sent again after a failure, and sent to a second replica before one.
        num_denied: retries and hedges that the budget did not allow.
        num_failed_items: items that got an error in the end.
        errors: by name, what parts broke off or were refused with, whether a retry helped or not.
        replicas: those of now.
    """

    num_requests: int
    num_parts: int
    num_retries: int
    num_hedges: int
    num_denied: int
    num_failed_items: int
    errors: dict[str, int]
    replicas: tuple[ReplicaStats, ...]
