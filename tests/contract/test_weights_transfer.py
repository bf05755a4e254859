"""Weights broadcast into a serving vLLM's workers, and what is refused before any worker waits for them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from protos.client import Teacher, connect, read_chunks
from protos.errors import Conflict, DeadlineExceeded, EngineFailed, InvalidRequest, PermissionDenied, TeacherError
from protos.records import ServedTeacher, TransferredTensor, WeightsTransfer, WeightsUpdate
from student_trainer.client_thread import ClientThread
from student_trainer.config import ConfigError
from student_trainer.weights_sync import WeightsSync
from student_trainer.weights_transfer import TENSOR_NAMES, transfer
from teacher_server import weights
from teacher_server.config import ServeConfig
from teacher_server.engines.base import EngineInfo, WeightsEngine
from teacher_server.served_model import ServedModel
from teacher_server.transfer import check_transfer
from tests.harness import LoopThread
from tests.reference import plain_model
from tests.taking_weights import ITEM, SECRET, WeightsEngineOver, serving_weights
from tests.tiny_model import build_tiny_qwen3

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Models:
    """The served one and another, of tied LM heads."""

    base: Path
    other: Path

    @property
    def weights(self) -> tuple[Weights, Weights]:
        return load_file(self.base / "model.safetensors"), load_file(self.other / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    (folder / "other").mkdir()
    return Models(build_tiny_qwen3(folder, tied=True), build_tiny_qwen3(folder / "other", seed=7, tied=True))


async def rows(teacher: Teacher) -> np.ndarray:
    """float32 [T] of ITEM, computed anew: nothing of it was in the prefix cache."""
    [result] = await teacher.score([ITEM])
    assert result.num_cached_tokens == 0
    return result.sampled_logprobs


def breaking_off(whole: Weights, num_tensors: int) -> Mapping[str, torch.Tensor]:
    """These weights, whose sender has only so many of them."""

    class Broken(dict[str, torch.Tensor]):
        def values(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
            yield from list(super().values())[:num_tensors]
            raise RuntimeError("out of memory")

    return Broken(whole)


@pytest.mark.slow
def test_transferred_weights_are_those_that_are_streamed(
    run: LoopThread, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, again and again, over a server that meanwhile loses senders; the last loss is its end."""
    vllm_engine = pytest.importorskip("teacher_server.engines.vllm")
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)

    async def scenario() -> None:
        base, other = models.weights
        engine = await vllm_engine.VllmEngine.create(
            str(models.base), dtype="float32", kv_cache_gib=0.25, max_adapters=1, weights_transfer="gloo"
        )
        async with serving_weights(engine, models.base, tmp_path) as served, served.connect("grpc") as teacher:
            info = await teacher.info()
            assert (info.weights_transfer, info.num_workers) == ("gloo", 1)
            of_base = await rows(teacher)

            # The weights of the start are in files, and come back when a transfer fails.
            with pytest.raises(EngineFailed) as caught:
                await transfer(teacher, WeightsUpdate("base", 1), breaking_off(other, 5), 60)
            assert f"the sender was lost after 5 of {len(other)} tensors" in caught.value.message
            assert "those served before were restored (the sender: out of memory)" in caught.value.message
            assert (await teacher.info()).weights_version == 0
            np.testing.assert_array_equal(await rows(teacher), of_base)

            await teacher.update_weights(WeightsUpdate("base", 1), read_chunks(models.other / "model.safetensors"))
            of_other = await rows(teacher)
            assert np.abs(of_other - of_base).max() > 0.1  # nats
            async with served.connect("http") as over_http:
                for version, carrier, sent, expected in ((2, teacher, base, of_base), (3, over_http, other, of_other)):
                    update = WeightsUpdate("base", version)
                    assert await transfer(carrier, update, sent, 60) == ServedTeacher("base", "model", version)
                    np.testing.assert_array_equal(await rows(teacher), expected)
            assert not served.folders()
            # As a trainer's run does it, from its model.
            assert await asyncio.to_thread(pushed, served.server.url("grpc"), models.base) == 4
            np.testing.assert_array_equal(await rows(teacher), of_base)

            # No file has the weights of version 4, but a sender that does not even come leaves them as they are.
            with pytest.raises(EngineFailed, match=r"did not come \(.*no sender at 127\.0\.0\.1:9.*still are"):
                await teacher.update_weights(update_of("127.0.0.1:9", other, 5), timeout_s=6)
            [result] = await teacher.score([ITEM])
            assert (result.weights_version, result.num_cached_tokens > 0) == (4, True)
            np.testing.assert_allclose(result.sampled_logprobs, of_base, rtol=0, atol=1e-5)
            with pytest.raises(Conflict, match="no file has them for a mean"):
                await teacher.update_weights(
                    WeightsUpdate("base", 5, ema_decay=0.5), read_chunks(models.other / "model.safetensors")
                )

            # Streamed, they are in a file again; a sender that stands still costs its deadline and no more.
            await teacher.update_weights(WeightsUpdate("base", 5), read_chunks(models.other / "model.safetensors"))
            started = time.monotonic()
            with pytest.raises(TeacherError) as lost:
                await transfer(teacher, WeightsUpdate("base", 6), standing_still(base, 5), 3)
            assert isinstance(lost.value, EngineFailed | DeadlineExceeded)
            assert time.monotonic() - started < 4
            np.testing.assert_array_equal(await rows(teacher), of_other)

            await transfer(teacher, WeightsUpdate("base", 7), base, 60)
            with pytest.raises(EngineFailed, match="no file has those served before: the engine was closed"):
                await transfer(teacher, WeightsUpdate("base", 8), breaking_off(other, 5), 60)
            assert served.core.dead.is_set()

    run(scenario())


def pushed(url: str, model: Path) -> int:
    """The version of these weights, pushed by a trainer."""
    client = ClientThread(url)
    try:
        return WeightsSync(client, carry=transfer, timeout_s=60).push(plain_model(model), torch.float32)
    finally:
        client.close()


def update_of(rendezvous: str, tensors_of: Weights, version: int, backend: str = "gloo") -> WeightsUpdate:
    tensors = tuple(
        TransferredTensor(name, TENSOR_NAMES[one.dtype], tuple(one.shape)) for name, one in tensors_of.items()
    )
    return WeightsUpdate("base", version, transfer=WeightsTransfer(backend, rendezvous, tensors))


def standing_still(whole: Weights, num_tensors: int) -> Mapping[str, torch.Tensor]:
    """These weights, of which the sender sends so many and then nothing for as long as the test lasts."""

    class Still(dict[str, torch.Tensor]):
        def values(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
            yield from list(super().values())[:num_tensors]
            time.sleep(10)

    return Still(whole)


class Receiving(WeightsEngineOver):
    """A real engine that says it takes transfers, and then waits for their senders for ever, as nccl does."""

    backend = "gloo"
    closed = False

    @property
    def info(self) -> EngineInfo:
        return replace(self.inner.info, weights_transfer=self.backend)

    async def receive_weights(self, transfer: WeightsTransfer, timeout_s: float) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def plain_engine(run: LoopThread, models: Models) -> Iterator[WeightsEngine]:
    """One that takes no transfers."""
    from teacher_server.engines.transformers import TransformersEngine

    engine = TransformersEngine(str(models.base))
    yield engine
    run(engine.close())


def test_a_server_without_transfers_says_so(
    run: LoopThread, scheme: str, plain_engine: WeightsEngine, models: Models, tmp_path: Path
) -> None:
    async def scenario() -> None:
        base, _ = models.weights
        async with serving_weights(plain_engine, models.base, tmp_path) as served, served.connect(scheme) as teacher:
            with pytest.raises(PermissionDenied) as caught:
                await teacher.update_weights(update_of("127.0.0.1:1", base, 1))
            assert caught.value.field == "transfer"
            assert caught.value.message == (
                "weights do not come by transfer here; send the bytes, or start the server with --engine vllm "
                "--weights-transfer gloo, or nccl on GPUs"
            )
            with pytest.raises(PermissionDenied, match=r'weights_by is "transfer", and .* takes none'):
                await transfer(teacher, WeightsUpdate("base", 1), base, 60)

    run(scenario())


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "backend": ({}, {"backend": "nccl"}, "transfer.backend", "backend is 'nccl'; this server takes 'gloo'"),
    "rendezvous": ({}, {"rendezvous": "host"}, "transfer.rendezvous", "rendezvous is 'host'; gloo needs HOST:PORT"),
    "no tensors": ({}, {"tensors": ()}, "", "is missing; the model has it as F32"),
    "another": ({}, {"tensors": (TransferredTensor("x", "F32", (1,)),)}, "", "is missing"),
    "path": ({"path": "x"}, {}, "path", "path is for weights in files, and a transfer has none"),
    "config": ({"adapter_config": "{}"}, {}, "adapter_config", "adapter_config is for weights in files"),
    "decay": ({"ema_decay": 0.5}, {}, "ema_decay", "ema_decay is for weights in files"),
    "version": ({"version": 0}, {}, "version", "version 0 is not above it"),
    "name": ({"teacher": "new"}, {}, "teacher", "a new one must be a LoRA adapter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_transfer_is_one_clear_error(
    run: LoopThread, scheme: str, plain_engine: WeightsEngine, models: Models, tmp_path: Path, case: str
) -> None:
    of_update, of_transfer, field, words = WRONG[case]

    async def scenario() -> None:
        right = update_of("127.0.0.1:9", models.weights[0], 1)
        assert right.transfer is not None
        wrong = replace(right, transfer=replace(right.transfer, **of_transfer), **of_update)
        async with (
            serving_weights(Receiving(plain_engine), models.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            with pytest.raises(TeacherError) as caught:
                await teacher.update_weights(wrong)
            assert words in caught.value.message
            assert caught.value.field == field
            assert not caught.value.row.retryable

    run(scenario())


def test_bytes_and_a_transfer_are_two_sources(
    run: LoopThread, scheme: str, plain_engine: WeightsEngine, models: Models, tmp_path: Path
) -> None:
    async def scenario() -> None:
        update = update_of("127.0.0.1:9", models.weights[0], 1)
        async with (
            serving_weights(Receiving(plain_engine), models.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            with pytest.raises(InvalidRequest, match="bytes follow although a transfer is given"):
                await teacher.update_weights(update, read_chunks(models.base / "model.safetensors"))

    run(scenario())


def test_an_engine_that_waits_for_ever_is_closed(
    run: LoopThread, plain_engine: WeightsEngine, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets its deadline's error, and the server ends for a supervisor to restart."""
    monkeypatch.setattr(weights, "GRACE_S", 0.2)

    async def scenario() -> None:
        engine = Receiving(plain_engine)
        async with serving_weights(engine, models.base, tmp_path) as served, served.connect("grpc") as teacher:
            with pytest.raises(DeadlineExceeded):
                await teacher.update_weights(update_of("127.0.0.1:9", models.weights[0], 1), timeout_s=0.3)
            async with asyncio.timeout(5):
                await served.core.dead.wait()
            assert engine.closed

    run(scenario())


def test_a_transfer_is_to_one_server(run: LoopThread, models: Models) -> None:
    async def scenario() -> None:
        async with connect("grpc://127.0.0.1:1,grpc://127.0.0.1:2") as pool:
            with pytest.raises(InvalidRequest, match="is a pool, and a transfer is to one server; send bytes"):
                await pool.update_weights(update_of("127.0.0.1:9", models.weights[0], 1))

    run(scenario())


def test_what_nccl_needs_of_a_transfer(models: Models) -> None:
    """128 bytes in base64, by nccl.h; a server of nccl refuses gloo's address."""
    model = ServedModel.find(str(models.base), None)
    right = update_of(base64.b64encode(bytes(128)).decode(), models.weights[0], 1, "nccl").transfer
    assert right is not None
    check_transfer(right, "nccl", model)
    for rendezvous in ("127.0.0.1:1", base64.b64encode(bytes(127)).decode()):
        with pytest.raises(InvalidRequest, match="nccl needs 128 bytes in base64"):
            check_transfer(replace(right, rendezvous=rendezvous), "nccl", model)
    twice = replace(right, tensors=(*right.tensors, right.tensors[0]))
    with pytest.raises(InvalidRequest, match="comes twice"):
        check_transfer(twice, "nccl", model)
    halved = tuple(replace(tensor, dtype="BF16") for tensor in right.tensors)
    check_transfer(replace(right, tensors=halved), "nccl", model)  # engines convert what is of floating point


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl is to be had")
def test_a_trainer_without_nccl_says_what_to_install(
    run: LoopThread, plain_engine: WeightsEngine, models: Models, tmp_path: Path
) -> None:
    async def scenario() -> None:
        engine = Receiving(plain_engine)
        engine.backend = "nccl"
        async with serving_weights(engine, models.base, tmp_path) as served, served.connect("grpc") as teacher:
            with pytest.raises(ConfigError, match=r'over nccl, which needs vLLM and a GPU .* weights_by to "stream"$'):
                await transfer(teacher, WeightsUpdate("base", 1), models.weights[0], 60)

    run(scenario())


def test_transfers_are_of_vllm() -> None:
    with pytest.raises(ValueError, match="weights_transfer is gloo; it needs the engine vllm, not transformers"):
        ServeConfig(model="m", engine="transformers", weights_transfer="gloo")


@pytest.mark.slow
def test_nccl_needs_gpus(run: LoopThread, models: Models) -> None:
    vllm_engine = pytest.importorskip("teacher_server.engines.vllm")
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    with pytest.raises(ValueError, match="which needs GPUs, and this vLLM runs on the CPU"):
        run(vllm_engine.VllmEngine.create(str(models.base), weights_transfer="nccl"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl takes a GPU for the sender and one for the worker")
def test_weights_go_from_gpu_to_gpu(
    run: LoopThread, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender is on this process's first GPU, and vLLM on the other."""
    vllm_engine = pytest.importorskip("teacher_server.engines.vllm")
    assert torch.cuda.get_device_name(0)  # so that this process has both before vLLM's inherits the variable
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    async def scenario() -> None:
        base, other = models.weights
        engine = await vllm_engine.VllmEngine.create(
            str(models.base), dtype="float32", kv_cache_gib=0.25, weights_transfer="nccl"
        )
        async with serving_weights(engine, models.base, tmp_path) as served, served.connect("grpc") as teacher:
            await teacher.update_weights(WeightsUpdate("base", 1), read_chunks(models.other / "model.safetensors"))
            of_other = await rows(teacher)
            await transfer(teacher, WeightsUpdate("base", 2), base, 60)
            await transfer(teacher, WeightsUpdate("base", 3), other, 60)
            np.testing.assert_array_equal(await rows(teacher), of_other)
        await engine.close()

    run(scenario())
