"""The program as a process: flags, start-up failures, the ready file, signals and drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protos.client import Teacher, connect
from protos.credentials import Tls
from protos.errors import NotReady, PermissionDenied, Unauthenticated
from protos.records import GenerateItem, GenerateRequest, ScoreItem, WeightsUpdate
from tests.authority import Authority
from tests.harness import ROOT, LoopThread, collector
from tests.lora import build_adapter
from tests.server_process import ANY_PORTS, PROGRAM, START_S, TINY_TRANSFORMERS, TINY_VLLM, ServerProcess


def finish(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *args], cwd=ROOT, capture_output=True, text=True, timeout=START_S, check=False)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("teacher-server: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last


def test_help_is_quick_and_light() -> None:
    script = (
        "import sys\n"
        "from teacher_server.cli import app\n"
        "app.parse_args(['serve', '--model', 'x'])\n"
        "app.parse_args(['bench', 'http://x:1', '--top-k', '3'])\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "fastapi", "grpc", "httpx", "numpy"} & set(done.stdout.split())
    done = finish("serve", "--help")
    assert done.returncode == 0
    for flag in ("--model", "--name", "--engine", "--http-port", "--grpc-port", "--threads", "--ready-file"):
        assert flag in done.stdout


def test_log_lines_carry_the_request_s_id_and_nothing_is_traced_unasked() -> None:
    script = (
        "import sys, structlog\n"
        "from teacher_server import serve\n"
        "serve._configure_log()\n"
        "structlog.contextvars.bind_contextvars(request_id='caller-1')\n"
        "structlog.get_logger().error('broken')\n"
        "assert serve._tracing(None) is None\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert json.loads(done.stderr)["request_id"] == "caller-1"
    assert "opentelemetry" not in done.stdout.split()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--otel-endpoint", "localhost:4318"], ["otel_endpoint is 'localhost:4318'", "http://"]),
        (["--bogus", "1"], ["--bogus"]),
        (["--engine", "llama"], ["llama", "transformers"]),
        (["--http-port", "70000"], ["http_port is 70000", "65535"]),
        (["--threads", "0"], ["threads is 0"]),
        (["--tls-cert", "a.pem"], ["tls_cert is a.pem and tls_key is absent; give both"]),
        (["--tls-key", "a.key"], ["tls_key is a.key and tls_cert is absent; give both"]),
        (["--tls-client-ca", "ca.pem"], ["tls_client_ca is ca.pem and tls_cert is absent"]),
        (["--max-message-mib", "257"], ["max_message_mib is 257", "256"]),
        (["--teacher", "rlvr"], ["teacher is 'rlvr'", "NAME=FOLDER"]),
        (["--teacher", "base=x"], ["teacher is 'base=x'", "a name of its own"]),
        (["--teacher", "a=x", "--teacher", "b=x", "--max-adapters", "1"], ["max_adapters is 1", "at least 2"]),
        (["--weights-root", "/no/such"], ["weights_root is /no/such", "folder that exists"]),
    ],
)
def test_a_bad_flag_is_one_sentence(args: list[str], words: list[str]) -> None:
    assert_one_sentence(finish("serve", "--model", "x", *args), *words)


def test_a_missing_folder_is_one_sentence() -> None:
    assert_one_sentence(finish("serve", "--model", "/no/such/model"), "no model folder /no/such/model")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tokens", "/no/such/file"], ["--tokens /no/such/file: No such file"]),
        (
            ["--tls-cert", "/no/such.pem", "--tls-key", "/no/such.key"],
            ["cannot use --tls-cert /no/such.pem", "No such"],
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tiny_model: Path, args: list[str], words: list[str]) -> None:
    assert_one_sentence(finish("serve", "--model", str(tiny_model), "--engine", "transformers", *args), *words)


def test_an_open_door_is_warned_of(tiny_model: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:  # so that the server ends at once
        args = ("--engine", "transformers", "--host", "0.0.0.0", "--http-port", str(taken.getsockname()[1]))
        done = finish("serve", "--model", str(tiny_model), *args)
    assert "anyone who reaches this address can score and generate" in done.stderr


@pytest.mark.slow
def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    args = ("--engine", "transformers", *ANY_PORTS)
    assert_one_sentence(finish("serve", "--model", str(tmp_path), *args), "cannot load", str(tmp_path))


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_port_in_use_is_one_sentence(tiny_model: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"--http-port": "0", "--grpc-port": "0"} | {flag: port}
        args = [part for pair in ports.items() for part in pair]
        done = finish("serve", "--model", str(tiny_model), "--engine", "transformers", *args)
    assert_one_sentence(done, port)


def test_a_missing_adapter_is_one_sentence(tiny_model: Path) -> None:
    done = finish("serve", "--model", str(tiny_model), "--teacher", "rlvr=/no/such/adapter")
    assert_one_sentence(done, "no folder /no/such/adapter", "'rlvr'")


@pytest.mark.slow
def test_a_folder_without_an_adapter_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    args = ("--engine", "transformers", *ANY_PORTS, "--teacher", f"rlvr={tmp_path}")
    assert_one_sentence(finish("serve", "--model", str(tiny_model), *args), str(tmp_path), "adapter_config.json")


@pytest.fixture
def process(tiny_model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tiny_model, tmp_path, *TINY_TRANSFORMERS, "--name", "teacher") as process:
        yield process


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_flight(run: LoopThread, process: ServerProcess) -> None:
    assert process.ready["pid"] == process.process.pid

    async def scenario() -> None:
        # 20 texts of 100 tokens, one after the other in this engine: some seconds of work.
        items = [GenerateItem(np.array([i], np.int32), max_new_tokens=100, ignore_eos=True) for i in range(20)]
        async with connect(process.ready["http_url"]) as slow, connect(process.ready["grpc_url"]) as other:
            assert (await other.info()).teachers == ("teacher",)
            stream = slow.generate_stream(request(items))
            replies = [await anext(stream)]
            os.kill(process.process.pid, signal.SIGTERM)
            with pytest.raises(NotReady, match="draining"):
                await score_for_ever(other)
            assert process.process.poll() is None
            replies += [reply async for reply in stream]
            assert sorted(index for index, _ in replies) == list(range(20))

    run(scenario())
    assert process.process.wait(30) == 0, process.log.read_text()


async def score_once(url: str) -> None:
    async with connect(url) as teacher:
        [result] = await teacher.score([ScoreItem(np.array([1, 2], np.int32), np.array([3], np.int32))])
        assert result.num_tokens == 1


async def score_for_ever(teacher: Teacher) -> None:
    while True:
        await teacher.score([ScoreItem(np.array([1], np.int32), np.array([2], np.int32))])


def request(items: list[GenerateItem]) -> GenerateRequest:
    return GenerateRequest(tuple(items))


@pytest.mark.slow
def test_the_log_has_one_line_a_request(run: LoopThread, process: ServerProcess) -> None:
    run(score_once(process.ready["grpc_url"]))
    process.stop(signal.SIGINT)
    lines = [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line["event"] == "request"]
    assert (line["operation"], line["num_items"], line["num_context_tokens"], line["num_new_tokens"]) == (
        "score",
        1,
        2,
        1,
    )
    assert line["request_id"]
    assert line["seconds"] > 0


@pytest.mark.slow
def test_a_guarded_server_never_logs_a_token(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    secret, wrong = "correct-horse-battery-staple", "a-wrong-token-of-some-length"
    tokens, authority = tmp_path / "tokens.toml", Authority(tmp_path / "tls")
    tokens.write_text(f'trainer = {{ token = "{secret}", scopes = ["score"] }}')
    tokens.chmod(0o600)
    cert, key = map(str, authority.server)
    args = (*TINY_TRANSFORMERS, "--tokens", str(tokens), "--tls-cert", cert, "--tls-key", key)

    async def scenario(url: str) -> None:
        tls = Tls(ca=authority.ca)
        item, text = ScoreItem(np.array([1], np.int32), np.array([2], np.int32)), GenerateItem(np.array([1], np.int32))
        async with connect(url, token=secret, tls=tls) as teacher:
            assert (await teacher.score([item]))[0].num_tokens == 1
            with pytest.raises(PermissionDenied):
                await teacher.generate([text])
        async with connect(url, token=wrong, tls=tls) as teacher:
            with pytest.raises(Unauthenticated):
                await teacher.score([item])

    with ServerProcess(tiny_model, tmp_path, *args) as process:
        for url in (process.ready["http_url"], process.ready["grpc_url"]):
            run(scenario(url))
        process.stop()
    written = process.log.read_text()
    assert '"client": "trainer"' in written
    assert "warning" not in written
    assert secret not in written
    assert wrong not in written


@pytest.mark.slow
def test_spans_are_sent_before_the_process_ends(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with (
        collector() as (url, received),
        ServerProcess(tiny_model, tmp_path, *TINY_TRANSFORMERS, "--otel-endpoint", url) as process,
    ):
        run(score_once(process.ready["grpc_url"]))
        process.stop()
    [(path, body)] = received
    assert path == "/v1/traces"
    [spans] = ExportTraceServiceRequest.FromString(body).resource_spans
    names = [span.name for scope in spans.scope_spans for span in scope.spans]
    assert sorted(names) == ["compose", "encode", "engine", "queue", "score"]
    assert {a.key: a.value.string_value for a in spans.resource.attributes}["service.name"] == "teacher-server"


@pytest.mark.slow
def test_vllm_serves_and_ends(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    async def named(url: str) -> tuple[str, ...]:
        async with connect(url) as stock:
            return (await stock.info()).teachers

    with ServerProcess(tiny_model, tmp_path, *TINY_VLLM) as process:
        run(score_once(process.ready["http_url"]))
        assert run(named(f"openai+{process.ready['http_url']}")) == ("base",)
        process.stop()


@pytest.mark.slow
def test_adapters_are_served_and_changed_as_the_flags_say(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    adapter = build_adapter(tmp_path, tiny_model, seed=1)
    secret = "of-the-operator-alone"
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[operator]\ntoken = "{secret}"\nscopes = ["score", "admin"]\n')
    tokens.chmod(0o600)
    flags = ("--teacher", f"rlvr={adapter}", "--max-adapters", "2", "--tokens", str(tokens))

    async def scenario(url: str) -> None:
        async with connect(url, token=secret) as teacher:
            assert (await teacher.info()).teachers == ("base", "rlvr")
            await teacher.update_weights(WeightsUpdate("sft", 1, path=adapter.name))
            ids = np.arange(8, dtype=np.int32)
            items = [ScoreItem(ids, ids, teacher=name) for name in ("base", "rlvr", "sft")]
            base, rlvr, sft = [result.sampled_logprobs for result in await teacher.score(items)]
            np.testing.assert_array_equal(rlvr, sft)
            assert np.abs(rlvr - base).max() > 0.1

    args = (*TINY_TRANSFORMERS, *flags, "--weights-root", str(tmp_path))
    with ServerProcess(tiny_model, tmp_path, *args) as process:
        run(scenario(process.ready["http_url"]))
        process.stop()


@pytest.mark.slow
def test_clients_on_loops_of_their_own(process: ServerProcess) -> None:
    # A synchronous trainer's way: a Runner, and connections that live as long as it.
    item = ScoreItem(np.array([1, 2], np.int32), np.array([3], np.int32))
    with asyncio.Runner() as runner:
        for url in (process.ready["http_url"], process.ready["grpc_url"]):
            teacher = connect(url)
            first = runner.run(teacher.score([item]))
            second = runner.run(teacher.score([item]))
            np.testing.assert_array_equal(first[0].sampled_logprobs, second[0].sampled_logprobs)
            runner.run(teacher.aclose())
