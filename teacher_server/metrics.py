"""What `/metrics` shows and the log's one line for each request."""

from __future__ import annotations

from dataclasses import asdict

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from protos.records import ServedTeacher
from teacher_server.summary import Summary

SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""From one cached prompt on a GPU to a long batch on a CPU."""

_log = structlog.get_logger()


class Metrics:
    """Prometheus metrics in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("operation",)
        self._requests = Counter(
            "teacher_requests", "Requests by how they ended.", ("operation", "error"), registry=self._registry
        )
        self._items = Counter("teacher_items", "Items asked for.", labels, registry=self._registry)
        self._failed = Counter("teacher_failed_items", "Items that got an error.", labels, registry=self._registry)
        self._tokens = Counter(
            "teacher_tokens",
            "Tokens by kind: context, cached (of the context), new (scored or written).",
            ("operation", "kind"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "teacher_request_seconds", "Whole requests.", labels, buckets=SECONDS_BUCKETS, registry=self._registry
        )
        self._queue_seconds = Histogram(
            "teacher_queue_seconds",
            "Longest wait of a request.",
            labels,
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._weights_version = Gauge(
            "teacher_weights_version", "Of the weights served.", ("teacher",), registry=self._registry
        )
        self.ready = Gauge("teacher_ready", "1 while work is taken.", registry=self._registry)

    def observe(self, summary: Summary) -> None:
        """Counts and logs one finished request."""
        operation = summary.operation
        self._requests.labels(operation, summary.error).inc()
        self._items.labels(operation).inc(summary.num_items)
        self._failed.labels(operation).inc(summary.num_failed)
        self._tokens.labels(operation, "context").inc(summary.num_context_tokens)
        self._tokens.labels(operation, "cached").inc(summary.num_cached_tokens)
        self._tokens.labels(operation, "new").inc(summary.num_new_tokens)
        self._seconds.labels(operation).observe(summary.seconds)
        self._queue_seconds.labels(operation).observe(summary.queue_s)
        _log.info("request", **asdict(summary))

    def show_teachers(self, served: tuple[ServedTeacher, ...]) -> None:
        """The teachers served from now on."""
        self._weights_version.clear()
        for teacher in served:
            self._weights_version.labels(teacher.name).set(teacher.weights_version)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)
