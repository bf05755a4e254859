"""`teacher-server info | score | bench | check`: the program against a real server, as a person asks it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from protos.errors import ContextTooLong, InvalidRequest
from protos.records import Chat, Message, Reference, ScoreItem, TeacherInfo
from teacher_server.bench import BenchResult, bench, random_item
from teacher_server.cli import main
from teacher_server.commands import BenchConfig
from teacher_server.engines.base import Engine, ScoreRows, ScoreTask
from teacher_server.wire_meter import WireMeter
from tests.harness import EngineOver, LoopThread, Server, core_over, serving


@dataclass
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str


Ask = Callable[..., Done]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command in this process; what the server beside it logs is kept apart."""

    def run_command(*args: str) -> Done:
        capsys.readouterr()
        with structlog.testing.capture_logs(), pytest.raises(SystemExit) as exited:
            main(args)
        assert isinstance(exited.value.code, int)
        written = capsys.readouterr()
        return Done(exited.value.code, written.out, written.err)

    return run_command


def as_json(ask: Ask, *args: str) -> Any:
    done = ask(*args, "--json")
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def test_info_as_a_table_and_as_json(ask: Ask, transformers_server: Server, scheme: str) -> None:
    url = transformers_server.url(scheme)
    found = as_json(ask, "info", url)
    assert (found["teachers"], found["max_context_tokens"], found["engine"]) == (["base", "same"], 256, "transformers")
    table = ask("info", url)
    assert table.status == 0
    for words in (url, "base, same", "tokenizer: vocab size", "304", "exact temperature", "True"):
        assert words in table.stdout


def test_score_shows_each_token_the_total_and_the_perplexity(
    run: LoopThread, ask: Ask, transformers_server: Server, tiny_model: Path
) -> None:
    url = transformers_server.url("grpc")
    args = ("score", url, "--prompt", "2+2?", "--reference", "4", "--top-k", "3", "--temperature", "0.7")
    # One token a byte in the tiny model's tokenizer.
    args = (*args, "--completion", "four", "--tokenizer", str(tiny_model))
    found = as_json(ask, *args)

    async def expected() -> Any:
        async with transformers_server.connect("http") as teacher:
            byte_ids = np.array([token["id"] for token in found["tokens"]], np.int32)
            item = ScoreItem(
                Chat((Message("user", "2+2?"),)), byte_ids, temperature=0.7, top_k=3, privileged=Reference("4")
            )
            return (await teacher.score([item]))[0]

    result = run(expected())
    assert [token["text"] for token in found["tokens"]] == ["f", "o", "u", "r"]
    assert [token["logprob"] for token in found["tokens"]] == result.sampled_logprobs.tolist()
    assert [[a["id"] for a in row] for row in found["alternatives"]] == result.top_ids.tolist()
    total = sum(result.sampled_logprobs.tolist())
    assert found["total_logprob"] == pytest.approx(total, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(-total / 4), rel=1e-6)
    assert found["num_context_tokens"] == result.num_context_tokens

    table = ask(*args)
    assert table.status == 0
    assert f"total {total:.4f} nats" in " ".join(table.stdout.split())
    assert f"{result.sampled_logprobs[0]:.4f}" in table.stdout


def test_check_exits_with_1_above_the_bound(ask: Ask, transformers_server: Server, tiny_model: Path) -> None:
    urls = f"{transformers_server.url('grpc')},{transformers_server.url('http')}"
    found = as_json(ask, "check", urls, "--reference", str(tiny_model), "--seed", "1")
    assert found["passed"] is True
    assert {finding["verdict"] for finding in found["findings"]} == {"pass"}
    # float32 sums in another order differ by more than 1e-12 nats somewhere.
    strict = ask("check", urls, "--reference", str(tiny_model), "--seed", "1", "--bound", "1e-12")
    assert strict.status == 1, strict.stderr
    assert "FAIL" in strict.stdout


def test_bench_prints_what_it_measured(ask: Ask, transformers_server: Server) -> None:
    url = transformers_server.url("http")
    args = ("--requests", "6", "--in-flight", "2", "--completion-tokens", "20", "--top-k", "2")
    found = as_json(ask, "bench", url, *args)
    assert (found["num_requests"], found["errors"]) == (6, {})
    table = ask("bench", url, *args)
    assert table.status == 0
    assert "scored tokens a second" in table.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["info", "localhost:8001"], ["'localhost:8001' is not a teacher's URL", "grpc://host:port"]),
        (["info", "http://127.0.0.1:1"], ["http://127.0.0.1:1 cannot be reached"]),
        (["check", "grpc://127.0.0.1:1"], ["grpc://127.0.0.1:1 cannot be reached"]),
        (["bench", "http://127.0.0.1:1", "--in-flight", "0"], ["in_flight is 0", "at least 1"]),
        (["bench", "http://127.0.0.1:1", "--seconds", "nan"], ["seconds is nan", "above 0"]),
        (["check", "http://127.0.0.1:1", "--bound", "-1"], ["bound is -1", "at least 0"]),
        (["score", "http://127.0.0.1:1", "--prompt", "a", "--completion", "b"], ["--tokenizer", "--completion-ids"]),
        (["score", "http://127.0.0.1:1", "--prompt", "a", "--prompt-ids", "1"], ["--prompt and --prompt-ids exclude"]),
        (["score", "http://127.0.0.1:1", "--prompt", "a"], ["completion", "--completion-ids"]),
        (["score", "http://127.0.0.1:1", "--prompt-ids", "1;2", "--completion-ids", "1"], ["'1;2'", "as in 1,2,3"]),
    ],
)
def test_a_mistake_is_one_sentence(ask: Ask, args: list[str], words: list[str]) -> None:
    done = ask(*args)
    assert done.status == 2, done.stderr
    [sentence] = done.stderr.strip().splitlines()
    assert sentence.startswith("teacher-server: ")
    for word in words:
        assert word in sentence


def test_a_mistake_that_the_server_finds_is_its_own_sentence(run: LoopThread, transformers_server: Server) -> None:
    url = transformers_server.url("grpc")
    with pytest.raises(ContextTooLong, match="340 tokens do not fit"):
        run(bench(url, BenchConfig(prompt_tokens=40, completion_tokens=300, requests=1, seed=0)))
    with pytest.raises(InvalidRequest, match="top_k is 1000"):
        run(bench(url, BenchConfig(top_k=1000, completion_tokens=20, requests=1, seed=0)))


def test_bench_counts_every_request_token_and_byte(run: LoopThread, transformers_server: Server, scheme: str) -> None:
    config = BenchConfig(
        requests=12, in_flight=3, items=2, completion_tokens=50, prompt_tokens=10, top_k=4, candidates=3, seed=0
    )
    num_asked = 0

    def on_request() -> None:
        nonlocal num_asked
        num_asked += 1

    result: BenchResult = run(bench(transformers_server.url(scheme), config, on_request))
    assert num_asked == result.num_requests == 12
    assert result.errors == {}
    assert result.tokens_per_s == pytest.approx(12 * 2 * 50 / result.seconds)
    assert result.p50_s is not None
    assert result.p99_s is not None
    assert 0 < result.p50_s <= result.p99_s <= result.seconds
    # A token: 4 bytes of its log-prob, 8 for each of the top 4, 4 for each of 3 candidates; and some for the envelope.
    received = 4 + 8 * 4 + 4 * 3
    assert result.received_bytes_per_token is not None
    assert received < result.received_bytes_per_token < received + 10
    # A token: its id and 3 candidates' of 4 bytes; and 10 prompt ids for 50 tokens.
    sent = 4 + 4 * 3 + 4 * 10 / 50
    assert result.sent_bytes_per_token is not None
    assert sent < result.sent_bytes_per_token < sent + 10


def test_bench_stops_when_the_time_is_over(run: LoopThread, transformers_server: Server) -> None:
    config = BenchConfig(seconds=0.5, in_flight=2, completion_tokens=10, top_k=0, seed=0)
    result = run(bench(transformers_server.url("grpc"), config))
    assert result.num_requests > 2
    assert 0.5 <= result.seconds < 5


def test_bench_counts_errors_by_name(run: LoopThread, transformers_engine: Engine, tiny_model: Path) -> None:
    @dataclass
    class FailingLater(EngineOver[Engine]):
        """A real engine that fails from its third task on: after the warm-up and the metered request."""

        num_tasks: int = 0

        async def score(self, task: ScoreTask) -> ScoreRows:
            self.num_tasks += 1
            if self.num_tasks > 2:
                raise RuntimeError("out of order")
            return await self.inner.score(task)

    async def scenario() -> BenchResult:
        async with serving(core_over(FailingLater(transformers_engine), tiny_model)) as server:
            return await bench(server.url("grpc"), BenchConfig(requests=4, completion_tokens=5, top_k=1, seed=0))

    with structlog.testing.capture_logs():
        result = run(scenario())
    assert (result.errors, result.num_requests, result.tokens_per_s) == ({"EngineFailed": 4}, 4, 0)
    assert result.p50_s is None


def test_random_items_stay_inside_the_vocabulary(run: LoopThread, transformers_server: Server) -> None:
    async def info() -> TeacherInfo:
        async with transformers_server.connect("grpc") as teacher:
            return await teacher.info()

    item = random_item(
        np.random.default_rng(0), run(info()), BenchConfig(candidates=30, completion_tokens=200, prompt_tokens=200)
    )
    assert isinstance(item.prompt, np.ndarray)
    assert item.candidate_ids is not None
    assert item.candidate_ids.shape == (200, 30)
    for ids in (item.prompt, item.completion_ids, item.candidate_ids):
        assert ids.min() >= 0
        assert 259 < ids.max() < 304  # the model's padding rows are scored like any other


def test_the_meter_counts_bytes_each_way(run: LoopThread) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(300)
        writer.write(b"y" * 7000)
        await writer.drain()
        writer.close()

    async def scenario() -> tuple[int, int]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with WireMeter.to(host, port) as meter:
            meter_host, meter_port = meter.address.split(":")
            reader, writer = await asyncio.open_connection(meter_host, int(meter_port))
            writer.write(b"x" * 300)
            received = await reader.read(-1)
            writer.close()
            assert len(received) == 7000
            counts = meter.counts()
        server.close()
        return counts

    assert run(scenario()) == (300, 7000)
