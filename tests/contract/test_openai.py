"""Stock clients against our port, and our client against a stock server, over vLLM: equal numbers, clear refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.client import Teacher, connect
from protos.errors import (
    Conflict,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    TeacherError,
    UnknownTeacher,
)
from protos.fingerprint import UNKNOWN, differences, tokenizer_fingerprint
from protos.records import Chat, GenerateItem, Message, PrivilegedIds, ScoreItem, ScoreRequest, SystemText
from student_trainer.scoring import Scorer, TeacherMismatch, Wanted
from teacher_server.admission import Admission, Ticket
from teacher_server.engines.base import Engine
from teacher_server.metrics import Metrics
from teacher_server.openai_admission import AdmittedOpenAI
from teacher_server.teachers import Teachers
from tests.harness import LoopThread, Server, core_over, start_server, until
from tests.prometheus import samples_of, value_of
from tests.stock import trl_scores
from tests.tiny_model import VOCAB_SIZE, byte_tokenizer

pytestmark = pytest.mark.slow

ATOL = 1e-4
"""Nats between vLLM's own prompt log-probs and ours, both float32."""

PROMPT = np.array([72, 105, 33, 10], np.int32)
COMPLETION = np.random.default_rng(0).integers(0, VOCAB_SIZE, 40).astype(np.int32)
ITEM = ScoreItem(PROMPT, COMPLETION, top_k=20)
BUDGET = 2**13
CHAT = Chat((Message("user", "2+2?"),))


class Recorder:
    """vLLM's application, and the paths that were asked of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.paths: list[str] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        await self._app(scope, receive, send)


@pytest.fixture(scope="module")
def recorder(run: LoopThread, vllm_engine: Engine) -> Recorder:
    from teacher_server.engines.vllm import VllmEngine

    assert isinstance(vllm_engine, VllmEngine)
    return Recorder(run(vllm_engine.openai_app(("base", "same"))))


@pytest.fixture(scope="module")
def admission() -> Admission:
    return Admission(BUDGET, BUDGET)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(scope="module")
def openai_server(
    run: LoopThread, vllm_engine: Engine, tiny_model: Path, recorder: Recorder, admission: Admission, metrics: Metrics
) -> Iterator[Server]:
    """A server over vLLM that answers stock clients too, in one queue with all others."""

    async def start() -> Server:
        teachers = Teachers(("base", "same"))
        core = core_over(vllm_engine, tiny_model, admission=admission, teachers=teachers)
        server = await start_server(core, metrics)
        server.gate.open(core, AdmittedOpenAI(recorder, admission, teachers, "base", max_tokens=BUDGET))
        return server

    server = run(start())
    yield server
    run(server.stop())


@pytest.fixture
def ours(run: LoopThread, openai_server: Server) -> Iterator[Teacher]:
    teacher = openai_server.connect("grpc")
    yield teacher
    run(teacher.aclose())


@pytest.fixture
def stock(run: LoopThread, openai_server: Server) -> Iterator[Teacher]:
    """Our client of vLLM's own endpoints."""
    teacher = connect(f"openai+{openai_server.url('http')}")
    yield teacher
    run(teacher.aclose())


@pytest.fixture
def client(openai_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{openai_server.url('http')}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client_lists_the_teachers(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "same"]


def test_the_openai_client_reads_prompt_logprobs(run: LoopThread, client: openai.OpenAI, ours: Teacher) -> None:
    answer = client.completions.create(
        model="same",
        prompt=[*PROMPT.tolist(), *COMPLETION.tolist()],
        max_tokens=1,
        extra_body={"prompt_logprobs": 5},
    )
    rows: Any = answer.choices[0].model_extra["prompt_logprobs"]  # pyright: ignore[reportOptionalSubscript]
    [result] = run(ours.score([replace(ITEM, top_k=5)]))
    assert rows[0] is None
    for row, token_id, logprob, top_ids in zip(
        rows[len(PROMPT) :], COMPLETION.tolist(), result.sampled_logprobs, result.top_ids.tolist(), strict=True
    ):
        assert row[str(token_id)]["logprob"] == pytest.approx(logprob, abs=ATOL)
        assert set(row) == {str(top_id) for top_id in top_ids} | {str(token_id)}


def test_the_openai_client_chats(run: LoopThread, client: openai.OpenAI, ours: Teacher) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "2+2?"}], max_tokens=8, temperature=0
    )
    [result] = run(ours.generate([GenerateItem(CHAT, max_new_tokens=8, temperature=0.0)]))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == result.num_context_tokens
    assert answer.choices[0].message.content == result.samples[0].text


@pytest.mark.filterwarnings("ignore:TRL currently supports vLLM versions:UserWarning")
def test_trl_reads_our_port(run: LoopThread, openai_server: Server, ours: Teacher) -> None:
    from trl.generation.vllm_client import VLLMClient

    answer = trl_scores(VLLMClient(base_url=openai_server.url("http")), [ITEM])
    [result] = run(ours.score([ITEM]))
    np.testing.assert_allclose(answer["logprobs"][0], result.top_logprobs, rtol=0, atol=ATOL)
    np.testing.assert_array_equal(answer["logprob_token_ids"][0], result.top_ids)


def test_nothing_that_administers_vllm_is_reachable(openai_server: Server) -> None:
    with httpx.Client(base_url=openai_server.url("http")) as http:
        for path in (
            "/v1/load_lora_adapter",
            "/v1/chat/completions/batch",
            "/v1/responses",
            "/reset_prefix_cache",
            "/sleep",
            "/collective_rpc",
            "/pause",
            "/start_profile",
            "/server_info",
            "/invocations",
        ):
            assert http.post(path, json={}).status_code == 404, path
            assert http.get(path).status_code == 404, path
        assert http.get("/v1/info").json()["teachers"] == ["base", "same"]


@pytest.mark.parametrize("field", ["vllm_xargs", "kv_transfer_params", "ec_transfer_params"])
def test_nothing_unread_reaches_the_worker(openai_server: Server, field: str) -> None:
    # Our worker takes `extra_args["score_rows"]` for a task of the core's: any other value would end the engine.
    body = {"model": "base", "prompt": [1, 2], "max_tokens": 1, field: {"score_rows": 1}}
    with httpx.Client(base_url=openai_server.url("http")) as http:
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert f"{field} is not taken" in answer.json()["error"]["message"]


def test_stock_clients_share_the_queue(
    run: LoopThread, client: openai.OpenAI, stock: Teacher, admission: Admission
) -> None:
    run(stock.info())
    # The budget is spent by another; half of the queue, all that one client may have, is filled by this address.
    own = [BUDGET // 2]

    async def fill() -> list[Ticket]:
        return [*admission.admit([BUDGET], "other"), *admission.admit(own, "127.0.0.1")]

    tickets = run(fill())
    try:
        with pytest.raises(openai.RateLimitError, match=r"4096 of this client\) and this request has 12;") as caught:
            client.completions.create(model="base", prompt=[1, 2, 3, 4], max_tokens=4, n=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(Overloaded, match="wait"):
            run(stock.score([ITEM]))
    finally:

        async def empty() -> None:
            for ticket in tickets:
                admission.release(ticket)

        run(empty())
    assert client.completions.create(model="base", prompt=[1, 2], max_tokens=1).choices
    # The last byte of an answer is out a moment before its share is given back.
    run(until(lambda: admission.tokens_in_flight == admission.tokens_queued == 0))


def test_stock_clients_are_in_the_metrics(run: LoopThread, client: openai.OpenAI, metrics: Metrics) -> None:
    counted = Counted(metrics)
    # 3 + 2 prompt tokens, each continued twice by 4 tokens; what was written cannot pass for a usage.
    client.completions.create(model="base", prompt=[[1, 2, 3], [4, 5]], max_tokens=4, n=2, extra_body=KEEP_WRITING)
    text = '"prompt_tokens":777'
    echoed = client.completions.create(model="base", prompt=text, max_tokens=1, echo=True, extra_body=KEEP_WRITING)
    assert text in echoed.choices[0].text
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt=[1], max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    refused = {"operation": "openai_chat", "error": "UnknownTeacher"}
    run(until(lambda: counted.since("teacher_requests_total", **refused)))  # a request is counted after its answer
    assert counted.since("teacher_requests_total", **refused) == 1
    assert counted.since("teacher_requests_total", operation="openai_completions", error="") == 2
    assert counted.since("teacher_requests_total", operation="openai_completions", error="InvalidRequest") == 1
    # The tokenizer has one token a byte.
    assert counted.since("teacher_tokens_total", operation="openai_completions", kind="context") == 3 + 2 + len(text)
    assert counted.since("teacher_tokens_total", operation="openai_completions", kind="new") == 2 * 2 * 4 + 1


KEEP_WRITING = {"ignore_eos": True}


class Counted:
    """How much each counter has grown."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before = samples_of(metrics.text())

    def since(self, name: str, **labels: str) -> float:
        now = samples_of(self._metrics.text())
        return (value_of(now, name, **labels) or 0.0) - (value_of(self._before, name, **labels) or 0.0)


def test_a_template_from_a_request_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="untrusted chat template"):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], extra_body={"chat_template": "{{ 1 }}"}
        )


@pytest.mark.parametrize("top_k", [0, 1, 20])
def test_scores_equal_ours(run: LoopThread, stock: Teacher, ours: Teacher, top_k: int) -> None:
    items = [
        replace(ITEM, top_k=top_k),
        replace(ITEM, top_k=top_k, privileged=PrivilegedIds(np.array([5, 6], np.int32)), teacher="same"),
        replace(ITEM, top_k=top_k, prompt=CHAT),
        replace(ITEM, top_k=top_k, completion_ids=np.empty(0, np.int32)),
    ]
    for theirs, mine in zip(run(stock.score(items)), run(ours.score(items)), strict=True):
        np.testing.assert_allclose(theirs.sampled_logprobs, mine.sampled_logprobs, rtol=0, atol=ATOL)
        np.testing.assert_allclose(theirs.top_logprobs, mine.top_logprobs, rtol=0, atol=ATOL)
        np.testing.assert_array_equal(theirs.top_ids, mine.top_ids)
        assert theirs.num_context_tokens == mine.num_context_tokens
    [result] = run(stock.score([ITEM]))
    own_in_top = (result.top_ids == COMPLETION[:, None]).any(axis=1)
    assert 0 < own_in_top.sum() < len(COMPLETION), "both kinds of row are needed for this test to say anything"


def test_info_says_what_a_stock_server_cannot(run: LoopThread, stock: Teacher) -> None:
    info = run(stock.info())
    assert info.teachers == ("base", "same")
    assert info.max_context_tokens == 256 - 1  # a stock server writes one token after what it scores
    assert info.max_top_k == VOCAB_SIZE or info.max_top_k == 1024
    assert (info.supports, info.exact_temperature, info.max_candidates) == (("sampled", "top_k"), False, 0)
    assert info.tokenizer == UNKNOWN


REFUSED: dict[str, tuple[ScoreItem, type[TeacherError], str, str]] = {
    "temperature": (replace(ITEM, temperature=0.7), InvalidRequest, "temperature", "ignore it"),
    "candidates": (
        replace(ITEM, candidate_ids=np.zeros((40, 1), np.int32)),
        InvalidRequest,
        "candidate_ids",
        "ids of the caller's choice",
    ),
    "entropy": (replace(ITEM, entropy=True), InvalidRequest, "entropy", "no entropy"),
    "half precision": (replace(ITEM, half_precision=True), InvalidRequest, "half_precision", "JSON"),
    "privileged text": (replace(ITEM, privileged=SystemText("4")), InvalidRequest, "privileged", "only privileged ids"),
    "top_k": (replace(ITEM, top_k=1025), InvalidRequest, "top_k", "from 0 to 1024"),
    "teacher": (replace(ITEM, teacher="nobody"), UnknownTeacher, "teacher", "served: base, same"),
    "length": (replace(ITEM, prompt=np.zeros(216, np.int32)), ContextTooLong, "", "256 tokens do not fit .* of 255"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_there_is_refused_before_it_is_sent(
    run: LoopThread, stock: Teacher, recorder: Recorder, case: str
) -> None:
    item, error, field, words = REFUSED[case]
    run(stock.info())
    recorder.paths.clear()
    with pytest.raises(error, match=words) as caught:
        run(stock.score([ITEM, item]))
    assert caught.value.field == f"items[1].{field}".rstrip(".")
    assert recorder.paths == []


def test_weights_there_have_no_version(run: LoopThread, stock: Teacher) -> None:
    with pytest.raises(Conflict, match="no version"):
        run(stock.score(ScoreRequest((ITEM,), min_weights_version=1)))


def test_the_server_s_own_refusal_keeps_its_words(run: LoopThread, stock: Teacher) -> None:
    with pytest.raises(InvalidRequest, match="out of vocabulary") as caught:
        run(stock.score([replace(ITEM, prompt=np.array([VOCAB_SIZE], np.int32))]))
    assert caught.value.field == "items[0]"


def test_one_wrong_item_does_not_fail_the_others(run: LoopThread, stock: Teacher) -> None:
    async def outcomes() -> dict[int, object]:
        wrong = replace(ITEM, prompt=np.array([VOCAB_SIZE], np.int32))
        return {index: outcome async for index, outcome in stock.score_stream(ScoreRequest((wrong, ITEM)))}

    by_index = run(outcomes())
    assert isinstance(by_index[0], InvalidRequest)
    assert not isinstance(by_index[1], TeacherError)


def test_samples_are_ours(run: LoopThread, stock: Teacher, ours: Teacher) -> None:
    item = GenerateItem(PROMPT, prefix_ids=COMPLETION[:3], max_new_tokens=12, temperature=0.0, num_samples=2)
    [theirs], [mine] = run(stock.generate([item])), run(ours.generate([item]))
    for a, b in zip(theirs.samples, mine.samples, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.finish_reason == b.finish_reason
        assert a.text


def test_samples_have_the_log_probs_of_their_ids(run: LoopThread, stock: Teacher, ours: Teacher) -> None:
    item = GenerateItem(PROMPT, max_new_tokens=12, num_samples=3, seed=1, ignore_eos=True)
    [result] = run(stock.generate([item]))
    assert len({tuple(sample.token_ids.tolist()) for sample in result.samples}) == 3
    scores = run(ours.score([ScoreItem(PROMPT, sample.token_ids) for sample in result.samples]))
    for sample, score in zip(result.samples, scores, strict=True):
        assert len(sample.token_ids) == 12
        np.testing.assert_allclose(sample.logprobs, score.sampled_logprobs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_samples_whose_log_probs_would_not_be_exact_are_refused(
    run: LoopThread, stock: Teacher, change: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match="exact at temperature 0 or 1"):
        run(stock.generate([replace(GenerateItem(PROMPT), **change)]))


def test_a_deadline_holds(run: LoopThread, stock: Teacher) -> None:
    run(stock.info())
    with pytest.raises(DeadlineExceeded, match=r"within 0\.001 s"):
        run(stock.score([ITEM], timeout_s=0.001))


def test_the_trainer_compares_what_ids_mean(openai_server: Server) -> None:
    tokenizer = byte_tokenizer()
    student = tokenizer_fingerprint(tokenizer, eos_token_ids=[258], vocab_size=VOCAB_SIZE)
    url = f"openai+{openai_server.url('http')}"
    with Scorer(url, temperature=1.0, timeout_s=60) as scorer:
        assert differences(scorer.info.tokenizer, student) == ["the teacher does not say which tokenizer it has"]
        scorer.handshake(student, Wanted(teacher_top_k=20), 255, tokenizer=tokenizer)
        other = byte_tokenizer()
        other.add_tokens(["<|more|>"])
        with pytest.raises(TeacherMismatch, match="same ids different texts"):
            scorer.handshake(student, Wanted(teacher_top_k=20), 255, tokenizer=other)
        with pytest.raises(TeacherMismatch, match="student's ids, which this teacher cannot give"):
            scorer.handshake(student, Wanted(student_top_k=20), 255, tokenizer=tokenizer)
    with (
        Scorer(url, temperature=0.7, timeout_s=60) as scorer,
        pytest.raises(TeacherMismatch, match=r"temperature 0\.7 is not exact"),
    ):
        scorer.handshake(student, Wanted(teacher_top_k=20), 255, tokenizer=tokenizer)
