"""One request as it is watched: its id, where its time goes and what it counts.

A listener begins it, the core and the encoders fill it, and the metrics, the log and the traces read it at its end. The
request's own task and the tasks made from it find it with `current` (a context variable).
"""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

import structlog

from protos.errors import TeacherError
from protos.records import GenerateItem, GenerateResult, ScoreItem, ScoreResult
from protos.wire import REQUEST_ID_HEADER

TRACE_HEADERS = ("traceparent", "tracestate")
"""Who called, as W3C Trace Context writes it (https://www.w3.org/TR/trace-context/)."""

PHASES = ("compose", "queue", "engine", "encode")
"""Validation and chat templates; waiting for admission; the engine; records to bytes."""

_ACCEPTED_ID = re.compile(r"[!-~]{1,64}")
"""Printable ASCII without spaces: a caller's id goes into log lines and headers."""


class Phase:
    """The time in which at least one item of a request was in one phase; a context manager that may overlap itself.

    Attributes:
        seconds: the length of that time.
        started, ended: when it first began and last ended, in `time.monotonic` seconds; None before that.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started: float | None = None
        self.ended: float | None = None
        self._num_inside = 0
        self._entered = 0.0

    def __enter__(self) -> None:
        if not self._num_inside:
            self._entered = time.monotonic()
            self.started = self._entered if self.started is None else self.started
        self._num_inside += 1

    def __exit__(self, *exc_info: object) -> None:
        self._num_inside -= 1
        if not self._num_inside:
            self.ended = time.monotonic()
            self.seconds += self.ended - self._entered


@dataclass(eq=False)
class Observation:
    """One request.

    Attributes:
        operation: "score", "generate", or a stock client's "openai_completions" or "openai_chat"; "" for what is not
            counted.
        client: whose share of the queue it is charged to.
        request_id: the caller's, where it is printable and short, else a new one.
        trace_headers: the caller's headers named in TRACE_HEADERS.
        error: the name of what failed the request as a whole ("Cancelled" when its caller vanished), or "".
        failed: items that got an error, by its name.
        scored: scored tokens by (teacher, support).
        started, started_ns: when it began, in `time.monotonic` seconds and in nanoseconds of the epoch.
        seconds: how long it took; set by `finish`.
    """

    operation: str = ""
    request_id: str = ""
    client: str = ""
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    num_items: int = 0
    num_succeeded: int = 0
    num_context_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    scored: Counter[tuple[str, str]] = field(default_factory=Counter)
    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in PHASES})
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    seconds: float = 0.0

    def add(
        self, teacher: str, item: ScoreItem | GenerateItem, outcome: ScoreResult | GenerateResult | TeacherError
    ) -> None:
        """Counts one item's outcome; `teacher` is a served name."""
        if isinstance(outcome, TeacherError):
            self.failed[outcome.name] += 1
            return
        self.num_succeeded += 1
        self.num_context_tokens += outcome.num_context_tokens
        self.num_cached_tokens += outcome.num_cached_tokens
        if isinstance(outcome, GenerateResult):
            self.num_new_tokens += sum(len(sample.token_ids) for sample in outcome.samples)
            return
        self.num_new_tokens += outcome.num_tokens
        assert isinstance(item, ScoreItem)
        for support in _supports(item):
            self.scored[teacher, support] += outcome.num_tokens

    def finish(self) -> None:
        """Sets the length; items that got no answer have failed with the request."""
        self.seconds = time.monotonic() - self.started
        if self.error:
            self.failed[self.error] += self.num_items - self.num_succeeded - self.failed.total()

    def log_line(self) -> dict[str, str | int | float]:
        """What the log says of it."""
        return {
            "request_id": self.request_id,
            "operation": self.operation,
            "client": self.client,
            "error": self.error,
            "num_items": self.num_items,
            "num_failed": self.failed.total(),
            "num_context_tokens": self.num_context_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_new_tokens": self.num_new_tokens,
            **{f"{name}_s": phase.seconds for name, phase in self.phases.items()},
            "seconds": self.seconds,
        }


Observe = Callable[[Observation], None]
"""Is handed every request that has ended."""

_current: ContextVar[Observation] = ContextVar("observation")


def begin(operation: str, headers: Mapping[str, str]) -> Observation:
    """The observation of the request that this task serves; the log lines of the task carry its id from now on."""
    given_id = headers.get(REQUEST_ID_HEADER, "")
    request_id = given_id if _ACCEPTED_ID.fullmatch(given_id) else _new_id()
    trace_headers = {name: headers[name] for name in TRACE_HEADERS if name in headers}
    observation = Observation(operation, request_id, trace_headers=trace_headers)
    _current.set(observation)
    structlog.contextvars.bind_contextvars(request_id=observation.request_id)
    return observation


def current() -> Observation:
    """The observation of the request that this task serves; one that nobody reads where no listener began one."""
    return _current.get(None) or Observation()


def phase(name: str) -> Phase:
    """A phase of the current request, to be entered."""
    return current().phases[name]


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def _supports(item: ScoreItem) -> list[str]:
    """What the item asked for, by its name in TeacherInfo.supports; every item gets its sampled log-probs."""
    asked = {
        "sampled": True,
        "top_k": item.top_k > 0,
        "candidates": item.candidate_ids is not None,
        "entropy": item.entropy,
    }
    return [support for support, is_asked in asked.items() if is_asked]
