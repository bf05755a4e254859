"""What a pool may be told; the defaults suit teachers whose requests take from a tenth of a second to a minute."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Settings of a TeacherPool.

    Attributes:
        min_part_tokens: a request is not split into parts below this: an engine's batch would be half empty.
        max_attempts: how often an item is sent at most, hedges not counted.
        backoff_s, max_backoff_s: bounds of the first and of every wait before a retry.
        retry_ratio, min_retries_per_s: retries and hedges are at most this share of the parts sent, plus so many a
            second; see `protos.pool.retry.RetryBudget`.
        hedge_after_s: what is unanswered after this long is sent to a second replica as well; None never.
        failures_to_open, cool_down_s: consecutive failures that take a replica out of use, and for how long.
        probe_interval_s: between two questions whether a replica is there, on average.
        probe_timeout_s: a replica that says nothing at all for so long after a question loses its work: it is frozen
            or cut off. A server answers beside its engine, so a long batch does not count as silence.
        stall_after_s: a stream without a reply for so long is given up even while the replica answers questions: its
            engine or its connection hangs. Longer than any single item takes, its time in the queue included.
        unavailable_after_s: how long work waits for any replica to come back before it fails.
        resolve_interval_s: between two look-ups of a name (`dns+grpc://`, `dns+http://`).
    """

    min_part_tokens: int = 2048
    max_attempts: int = 4
    backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    retry_ratio: float = 0.2
    min_retries_per_s: float = 2.0
    hedge_after_s: float | None = None
    failures_to_open: int = 3
    cool_down_s: float = 5.0
    probe_interval_s: float = 2.0
    probe_timeout_s: float = 10.0
    stall_after_s: float = 300.0
    unavailable_after_s: float = 30.0
    resolve_interval_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0 and field.name not in ("retry_ratio", "min_retries_per_s"):
                raise ValueError(f"{field.name} is {value}; it must be above 0")
        for name in ("retry_ratio", "min_retries_per_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
