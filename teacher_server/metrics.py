"""What `/metrics` shows and the log's one line for each request."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from protos.records import ServedTeacher
from teacher_server.engines.base import Engine
from teacher_server.observation import Observation

SECONDS_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""From encoding one reply to a long batch on a CPU."""

_log = structlog.get_logger()


class Load(Protocol):
    """How much work there is, in tokens."""

    tokens_in_flight: int
    tokens_queued: int


class Metrics:
    """Prometheus metrics in a registry of their own; teachers are served names, so every label has few values."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        of_operation = ("operation",)
        self._requests = Counter(
            "teacher_requests", "Requests by how they ended.", ("operation", "error"), registry=registry
        )
        self._items = Counter("teacher_items", "Items asked for.", of_operation, registry=registry)
        self._failed = Counter(
            "teacher_failed_items", "Items that got an error, by its name.", ("operation", "error"), registry=registry
        )
        self._tokens = Counter(
            "teacher_tokens",
            "Tokens by kind: context, cached (part of context: their ratio is the hit rate), new (scored or written).",
            ("operation", "kind"),
            registry=registry,
        )
        self._scored = Counter(
            "teacher_scored_tokens",
            "Tokens scored, once for each support that was asked for.",
            ("teacher", "support"),
            registry=registry,
        )
        self._seconds = Histogram(
            "teacher_request_seconds", "Whole requests.", of_operation, buckets=SECONDS_BUCKETS, registry=registry
        )
        self._phase_seconds = Histogram(
            "teacher_phase_seconds",
            "The time of a request in which at least one of its items was in the phase.",
            ("operation", "phase"),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._weights_version = Gauge(
            "teacher_weights_version", "Of the weights served.", ("teacher",), registry=registry
        )
        self.ready = Gauge("teacher_ready", "1 while work is taken.", registry=registry)
        ProcessCollector(registry=registry)

    def watch(self, load: Load, max_tokens_in_flight: int, engine: Engine) -> None:
        """Shows, whenever the metrics are read, what the server holds at that moment: what a leak would show in."""
        for name, text, value in (
            ("teacher_tokens_in_flight", "Tokens admitted to the engine.", lambda: load.tokens_in_flight),
            ("teacher_tokens_in_flight_budget", "How many may be admitted.", lambda: max_tokens_in_flight),
            ("teacher_tokens_queued", "Tokens that wait for admission.", lambda: load.tokens_queued),
            ("teacher_engine_requests", "Requests that the engine holds.", lambda: engine.num_unfinished),
            ("teacher_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks())),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def observe(self, request: Observation) -> None:
        """Counts and logs one request that has ended."""
        operation = request.operation
        self._requests.labels(operation, request.error).inc()
        self._items.labels(operation).inc(request.num_items)
        for error, num_items in request.failed.items():
            self._failed.labels(operation, error).inc(num_items)
        self._tokens.labels(operation, "context").inc(request.num_context_tokens)
        self._tokens.labels(operation, "cached").inc(request.num_cached_tokens)
        self._tokens.labels(operation, "new").inc(request.num_new_tokens)
        for (teacher, support), num_tokens in request.scored.items():
            self._scored.labels(teacher, support).inc(num_tokens)
        self._seconds.labels(operation).observe(request.seconds)
        for name, phase in request.phases.items():
            self._phase_seconds.labels(operation, name).observe(phase.seconds)
        _log.info("request", **request.log_line())

    def show_teachers(self, served: tuple[ServedTeacher, ...]) -> None:
        """The teachers served from now on."""
        self._weights_version.clear()
        for teacher in served:
            self._weights_version.labels(teacher.name).set(teacher.weights_version)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format; to be called in the event loop."""
        return generate_latest(self._registry)
