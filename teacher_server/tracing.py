"""OpenTelemetry spans of requests that have ended; the only place that imports opentelemetry (the extra `otel`).

A request is one span with a child for each phase it went through. The phases of a request's items overlap, so a child
spans from the first item's entry to the last one's exit, and its attribute `busy_s` says how much of that was spent in
it. The parent is the caller's span, where a W3C traceparent came with the request.
"""

from __future__ import annotations

import os

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from teacher_server.observation import Observation

DEFAULT_SERVICE_NAME = "teacher-server"
TRACES_PATH = "/v1/traces"
"""Where a collector takes traces over HTTP: the OTLP specification, "OTLP/HTTP Request"."""


class Tracing:
    """Turns observations into spans and hands them to `processor`."""

    def __init__(self, processor: SpanProcessor) -> None:
        name = os.environ.get(OTEL_SERVICE_NAME, DEFAULT_SERVICE_NAME)
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("teacher_server")

    @classmethod
    def to_collector(cls, endpoint: str | None) -> Tracing:
        """Sends spans in batches, from a thread, to a collector's base URL; None leaves all to OTEL_* variables."""
        url = None if endpoint is None else endpoint.rstrip("/") + TRACES_PATH
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))

    def observe(self, request: Observation) -> None:
        """The spans of one request."""

        def epoch_ns(monotonic_s: float) -> int:
            return request.started_ns + round((monotonic_s - request.started) * 1e9)

        span = self._tracer.start_span(
            request.operation,
            TraceContextTextMapPropagator().extract(request.trace_headers),
            SpanKind.SERVER,
            {f"teacher.{name}": value for name, value in request.log_line().items()},
            start_time=request.started_ns,
        )
        context = set_span_in_context(span)
        for name, phase in request.phases.items():
            if phase.started is not None and phase.ended is not None:
                child = self._tracer.start_span(
                    name, context, attributes={"busy_s": phase.seconds}, start_time=epoch_ns(phase.started)
                )
                child.end(epoch_ns(phase.ended))
        if request.error:
            span.set_status(StatusCode.ERROR, request.error)
        span.end(epoch_ns(request.started + request.seconds))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
