"""One finished request in numbers, for the log and the metrics."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from protos.errors import TeacherError
from protos.records import GenerateResult, ScoreResult


@dataclass(frozen=True)
class Summary:
    """One finished request, for logs and metrics; `error` is the name of what failed it as a whole, or ""."""

    request_id: str
    operation: str
    client: str
    error: str
    num_items: int
    num_failed: int
    num_context_tokens: int
    num_new_tokens: int
    num_cached_tokens: int
    queue_s: float
    seconds: float


class Tally:
    """Counts one request's outcomes."""

    def __init__(self, operation: str, client: str, num_items: int) -> None:
        self.error = ""
        self._operation = operation
        self._client = client
        self._num_items = num_items
        self._num_failed = 0
        self._num_context_tokens = 0
        self._num_new_tokens = 0
        self._num_cached_tokens = 0
        self._queue_s = 0.0

    def add(self, outcome: ScoreResult | GenerateResult | TeacherError) -> None:
        """Counts one item's outcome."""
        if isinstance(outcome, TeacherError):
            self._num_failed += 1
            return
        self._num_context_tokens += outcome.num_context_tokens
        self._num_new_tokens += (
            outcome.num_tokens
            if isinstance(outcome, ScoreResult)
            else sum(len(sample.token_ids) for sample in outcome.samples)
        )
        self._num_cached_tokens += outcome.num_cached_tokens
        self._queue_s = max(self._queue_s, outcome.queue_s)

    def summary(self, seconds: float) -> Summary:
        """The request's summary."""
        return Summary(
            request_id=uuid.uuid4().hex[:12],
            operation=self._operation,
            client=self._client,
            error=self.error,
            num_items=self._num_items,
            num_failed=self._num_items if self.error else self._num_failed,
            num_context_tokens=self._num_context_tokens,
            num_new_tokens=self._num_new_tokens,
            num_cached_tokens=self._num_cached_tokens,
            queue_s=self._queue_s,
            seconds=seconds,
        )
