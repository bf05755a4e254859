"""What is known of a request afterwards: metrics, log lines, request ids and spans, over real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import structlog

from protos import codec
from protos.errors import EngineFailed, NotReady, TeacherError, UnknownTeacher
from protos.records import GenerateItem, ScoreItem, ScoreRequest
from protos.wire import PROTOBUF_TYPE
from teacher_server.admission import Admission
from teacher_server.engines.base import Engine, ScoreRows, ScoreTask
from teacher_server.metrics import Metrics
from teacher_server.observation import PHASES, Observation
from teacher_server.observers import ObservingInterceptor
from tests.harness import EngineOver, HeldEngine, LoopThread, Server, core_over, serving, until
from tests.prometheus import Samples, samples_of, value_of

PROMPT = np.array([1, 2, 3], np.int32)
ITEM = ScoreItem(PROMPT, np.array([4, 5], np.int32))
"""3 tokens of context and 2 to score."""


async def samples(server: Server) -> Samples:
    """What /metrics says."""
    async with httpx.AsyncClient(base_url=server.listeners.http_url) as client:
        return samples_of((await client.get("/metrics")).content)


class Sick(EngineOver[Engine]):
    """A real engine that fails on a completion which begins with 7, and takes a moment over every other."""

    async def score(self, task: ScoreTask) -> ScoreRows:
        await asyncio.sleep(0.02)
        if task.completion_ids[0] == 7:
            raise RuntimeError("out of order")
        return await self.inner.score(task)


SICK_ITEM = ScoreItem(PROMPT, np.array([7, 7, 7], np.int32))


def test_the_metrics_say_what_was_done(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    candidates = np.array([[1, 2], [3, 4]], np.int32)
    items = [
        ITEM,
        ScoreItem(PROMPT, ITEM.completion_ids, top_k=3, teacher="same"),
        ScoreItem(PROMPT, ITEM.completion_ids, top_k=3, candidate_ids=candidates, entropy=True, teacher="same"),
        SICK_ITEM,
    ]

    async def scenario() -> Samples:
        metrics = Metrics()
        core = core_over(Sick(transformers_engine), tiny_model)
        async with serving(core, metrics) as server, server.connect(scheme) as teacher:
            outcomes = [reply async for reply in teacher.score_stream(ScoreRequest(tuple(items)))]
            assert sum(isinstance(outcome, TeacherError) for _, outcome in outcomes) == 1
            with pytest.raises(UnknownTeacher):
                await teacher.score([ScoreItem(PROMPT, ITEM.completion_ids, teacher="nobody")] * 2)
            await teacher.generate([GenerateItem(PROMPT, max_new_tokens=2, num_samples=3, ignore_eos=True)])
            return await samples(server)

    found = run(scenario())
    assert value_of(found, "teacher_requests_total", operation="score", error="") == 1
    assert value_of(found, "teacher_requests_total", operation="score", error="UnknownTeacher") == 1
    assert value_of(found, "teacher_items_total", operation="score") == 4 + 2
    assert value_of(found, "teacher_failed_items_total", operation="score", error="EngineFailed") == 1
    assert value_of(found, "teacher_failed_items_total", operation="score", error="UnknownTeacher") == 2
    # Three items succeeded: 3 tokens of context and 2 scored each.
    assert value_of(found, "teacher_tokens_total", operation="score", kind="context") == 9
    assert value_of(found, "teacher_tokens_total", operation="score", kind="new") == 6
    assert value_of(found, "teacher_tokens_total", operation="generate", kind="new") == 3 * 2
    assert value_of(found, "teacher_scored_tokens_total", teacher="base", support="sampled") == 2
    assert value_of(found, "teacher_scored_tokens_total", teacher="base", support="top_k") is None
    assert value_of(found, "teacher_scored_tokens_total", teacher="same", support="sampled") == 4
    assert value_of(found, "teacher_scored_tokens_total", teacher="same", support="top_k") == 4
    assert value_of(found, "teacher_scored_tokens_total", teacher="same", support="candidates") == 2
    assert value_of(found, "teacher_scored_tokens_total", teacher="same", support="entropy") == 2
    assert not [labels for name, labels in found if name == "teacher_scored_tokens_total" and "nobody" in str(labels)]
    for phase in PHASES:
        assert value_of(found, "teacher_phase_seconds_count", operation="score", phase=phase) == 2
    engine_s = value_of(found, "teacher_phase_seconds_sum", operation="score", phase="engine")
    whole_s = value_of(found, "teacher_request_seconds_sum", operation="score")
    assert engine_s is not None
    assert whole_s is not None
    # Items overlap: the phase is the time with at least one in the engine, not the sum of four.
    assert 0.02 <= engine_s < whole_s


@pytest.mark.slow
def test_the_prefix_cache_is_counted(run: LoopThread, vllm_engine: Engine, tiny_model: Path) -> None:
    prompt = np.random.default_rng(11).integers(0, 256, 150).astype(np.int32)
    completions = [np.array([i], np.int32) for i in (1, 2)]

    async def scenario() -> tuple[Samples, int]:
        metrics = Metrics()
        async with (
            serving(core_over(vllm_engine, tiny_model), metrics) as server,
            server.connect("grpc") as teacher,
        ):
            results = [(await teacher.score([ScoreItem(prompt, completion)]))[0] for completion in completions]
            return await samples(server), sum(result.num_cached_tokens for result in results)

    found, num_cached_tokens = run(scenario())
    assert num_cached_tokens > 0
    assert value_of(found, "teacher_tokens_total", operation="score", kind="cached") == num_cached_tokens
    assert value_of(found, "teacher_tokens_total", operation="score", kind="context") == 2 * 150


def test_the_load_is_shown(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    async def scenario() -> list[Samples]:
        # Items of 5 tokens: one in flight, two waiting.
        held, admission, metrics = HeldEngine(transformers_engine), Admission(5, 1000), Metrics()
        metrics.watch(admission, 5, held)
        core = core_over(held, tiny_model, admission=admission)
        async with serving(core, metrics) as server, server.connect("grpc") as teacher:
            asking = asyncio.create_task(teacher.score([ITEM] * 3))
            await until(lambda: held.num_active == 1)
            busy = await samples(server)
            held.door.set()
            await asking
            return [busy, await samples(server)]

    busy, idle = run(scenario())
    assert (value_of(busy, "teacher_tokens_in_flight"), value_of(busy, "teacher_tokens_queued")) == (5, 10)
    assert (value_of(idle, "teacher_tokens_in_flight"), value_of(idle, "teacher_tokens_queued")) == (0, 0)
    assert value_of(idle, "teacher_tokens_in_flight_budget") == 5


def test_refusals_before_the_core_are_counted(run: LoopThread, scheme: str) -> None:
    async def scenario() -> Samples:
        metrics = Metrics()
        async with serving(None, metrics) as server, server.connect(scheme) as teacher:
            with pytest.raises(NotReady):
                await teacher.score([ITEM])
            await raw_score(server, scheme, b"\xff\xff", {})
            return await samples(server)

    found = run(scenario())
    assert value_of(found, "teacher_requests_total", operation="score", error="NotReady") == 1
    assert value_of(found, "teacher_requests_total", operation="score", error="InvalidRequest") == 1


def test_a_refusal_by_an_interceptor_is_observed(run: LoopThread) -> None:
    seen: list[Observation] = []

    async def refuse(_: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

    class Refusing(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> grpc.RpcMethodHandler:
            return grpc.stream_stream_rpc_method_handler(refuse)

    async def scenario() -> tuple[grpc.StatusCode, Any]:
        server = grpc.aio.server(interceptors=(ObservingInterceptor(seen.append), Refusing()))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_stream("/teacher.v1.TeacherService/Score")(b"", metadata=(("x-request-id", "me"),))
            answer = await call.code(), dict(await call.initial_metadata())["x-request-id"]
        await server.stop(0)
        return answer

    assert run(scenario()) == (grpc.StatusCode.UNAUTHENTICATED, "me")
    assert [observation.request_id for observation in seen] == ["me"]


async def raw_score(
    server: Server, scheme: str, body: bytes, headers: dict[str, str]
) -> tuple[str, TeacherError | None]:
    """The request id that came back, and the error of the request as a whole."""
    if scheme == "http":
        async with httpx.AsyncClient(base_url=server.listeners.http_url) as client:
            types = {"content-type": PROTOBUF_TYPE, "accept": PROTOBUF_TYPE}
            answer = await client.post("/v1/score", content=body, headers=types | headers)
            error = None if answer.status_code == 200 else codec.decode_error(answer.content)
            return answer.headers["x-request-id"], error
    async with grpc.aio.insecure_channel(server.listeners.grpc_url.removeprefix("grpc://")) as channel:
        call = channel.unary_stream("/teacher.v1.TeacherService/Score")(body, metadata=tuple(headers.items()))
        request_id = str(dict(await call.initial_metadata())["x-request-id"])
        try:
            _ = [reply async for reply in call]
        except grpc.aio.AioRpcError as error:
            trailing: Any = error.trailing_metadata() or ()
            return request_id, codec.decode_error(dict(trailing)["teacher-error-bin"])
        return request_id, None


def score_body(*items: ScoreItem) -> bytes:
    return codec.encode_score_request(ScoreRequest(items))


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("run-7.step-12", True), ("x" * 64, True), ("x" * 65, False), ("two words", False), ("", False), (None, False)],
)
def test_a_request_id_is_taken_or_made_and_sent_back(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path, given: str | None, is_kept: bool
) -> None:
    seen: list[Observation] = []

    async def scenario() -> str:
        core = core_over(transformers_engine, tiny_model)
        headers = {} if given is None else {"x-request-id": given}
        async with serving(core, observers=(seen.append,)) as server:
            returned, error = await raw_score(server, scheme, score_body(ITEM), headers)
            assert error is None
            return returned

    returned = run(scenario())
    assert [observation.request_id for observation in seen] == [returned]
    assert (returned == given) == is_kept
    assert len(returned) >= 12


def test_concurrent_requests_keep_their_own_ids_in_the_log(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    ids = [f"caller-{i}" for i in range(8)]

    async def scenario() -> list[str]:
        async with serving(core_over(Sick(transformers_engine), tiny_model)) as server:
            # All are in the engine at once; each logs its failure from a task of its own.
            answers = await asyncio.gather(
                *(raw_score(server, scheme, score_body(SICK_ITEM), {"x-request-id": id_}) for id_ in ids)
            )
            return [returned for returned, error in answers if isinstance(error, EngineFailed)]

    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        assert run(scenario()) == ids
    assert sorted(line["request_id"] for line in lines if line["event"] == "engine failed") == ids
    requests = [line for line in lines if line["event"] == "request"]
    assert sorted(line["request_id"] for line in requests) == ids
    assert {line["error"] for line in requests} == {"EngineFailed"}


def test_a_client_that_vanished_is_counted_as_cancelled(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    seen: list[Observation] = []

    async def scenario() -> None:
        held = HeldEngine(transformers_engine)
        core = core_over(held, tiny_model)
        async with serving(core, observers=(seen.append,)) as server, server.connect(scheme) as teacher:
            asking = asyncio.create_task(teacher.score([ITEM]))
            await until(lambda: held.num_active == 1)
            asking.cancel()
            await until(lambda: seen)

    run(scenario())
    assert [(observation.error, observation.failed) for observation in seen] == [("Cancelled", {"Cancelled": 1})]


TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
"""The example of the W3C's Trace Context."""


def test_a_request_is_a_span_with_a_child_for_each_phase(
    run: LoopThread, scheme: str, transformers_engine: Engine, tiny_model: Path
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import format_span_id, format_trace_id

    from teacher_server.tracing import Tracing

    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))

    async def scenario() -> Sequence[ReadableSpan]:
        core = core_over(Sick(transformers_engine), tiny_model)
        async with serving(core, observers=(tracing.observe,)) as server:
            headers = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01", "x-request-id": "traced"}
            await raw_score(server, scheme, score_body(ITEM, ITEM), headers)
            await raw_score(server, scheme, b"\xff\xff", {})
        return exporter.get_finished_spans()

    spans = run(scenario())
    tracing.close()
    *children, request, refused = spans
    assert request.parent is not None
    assert format_span_id(request.parent.span_id) == CALLER_ID
    assert request.attributes is not None
    assert (request.attributes["teacher.request_id"], request.attributes["teacher.num_items"]) == ("traced", 2)
    assert [child.name for child in children] == ["compose", "queue", "engine", "encode"]
    for span in (request, *children):
        context = span.context
        assert context is not None
        assert format_trace_id(context.trace_id) == TRACE_ID
        assert request.start_time is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert request.end_time is not None
        assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    for child in children:
        assert child.parent == request.context
    # Without a traceparent a trace of its own; refused before the core, it went through no phase.
    assert refused.parent is None
    assert (refused.name, refused.status.is_ok, refused.status.description) == ("score", False, "InvalidRequest")


def test_a_body_that_breaks_off_is_an_invalid_request_and_no_failure_of_ours(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Observation] = []

    async def scenario() -> None:
        core = core_over(transformers_engine, tiny_model)
        async with serving(core, observers=(seen.append,)) as server:
            url = httpx.URL(server.listeners.http_url)
            _, writer = await asyncio.open_connection(url.host, url.port)
            head = f"POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-type: {PROTOBUF_TYPE}\r\ncontent-length: 100\r\n\r\n"
            writer.write(head.encode() + b"12345")
            await writer.drain()
            writer.close()
            await until(lambda: seen)

    run(scenario())
    assert [observation.error for observation in seen] == ["InvalidRequest"]
    assert not caplog.records
