"""Adapters and weights that change under a serving engine, over {http, grpc} x {transformers, vllm}."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from protos.client import Teacher, read_chunks
from protos.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    PermissionDenied,
    TeacherError,
    UnknownTeacher,
)
from protos.records import GenerateItem, ScoreItem, ScoreRequest, ScoreResult, ServedTeacher, WeightsUpdate
from teacher_server import auth
from teacher_server.core import TeacherCore
from teacher_server.engines.base import (
    Adapter,
    Engine,
    EngineDeadError,
    ScoreRows,
    ScoreTask,
    WeightsEngine,
)
from teacher_server.metrics import Metrics
from teacher_server.served_model import ServedModel
from teacher_server.teachers import Teachers
from teacher_server.weights import WeightsAdmin
from tests.harness import EngineOver, LoopThread, Server, core_over, serving, start_server, until
from tests.lora import build_adapter, merged_model, plain_model, sampled_logprobs
from tests.readme import python_blocks, run_block
from tests.tiny_model import build_tiny_qwen3

ATOL = 1e-4
"""Nats between an adapter applied beside the weights and merged into them, in float32."""

CLEARLY = 0.1
"""Nats by which other weights differ at least; those of these tests differ by more than one."""

MAX_RANK = 8
SECRET = "of-whoever-changes-weights"
ACCESS = auth.Access((auth.Token("operator", auth.sha256_of(SECRET), frozenset(auth.SCOPES)),))
CONTEXT = np.arange(40, 140, dtype=np.int32)
COMPLETION = np.arange(200, 230, dtype=np.int32)
ITEM = ScoreItem(CONTEXT, COMPLETION)


@dataclass(frozen=True)
class Files:
    """What the tests put into a server, each with a transformers model that answers as the server should."""

    base: Path
    other: Path
    adapters: tuple[Path, Path, Path]

    def expected(self, *, adapter: int | None = None, model: Path | None = None) -> np.ndarray:
        """float32 [T] for ITEM."""
        merged = plain_model(model or self.base) if adapter is None else merged_model(self.base, self.adapters[adapter])
        return sampled_logprobs(merged, CONTEXT, COMPLETION)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tied LM head, as most small models have it, and as loading in place gets it wrong."""
    return build_tiny_qwen3(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Files:
    folder = tmp_path_factory.mktemp("weights")
    adapters = (
        build_adapter(folder, model, seed=1),
        build_adapter(folder, model, seed=2, targets=("q_proj", "up_proj"), r=MAX_RANK),
        build_adapter(folder, model, seed=3, use_rslora=True),
    )
    return Files(model, build_tiny_qwen3(folder, seed=7, tied=True), adapters)


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, run: LoopThread, model: Path) -> Iterator[WeightsEngine]:
    """An engine of this file's own, which the tests change and put back."""
    if request.param == "vllm":
        from teacher_server.engines.vllm import VllmEngine

        limits: dict[str, Any] = {"max_adapters": 2, "max_lora_rank": MAX_RANK}
        engine = run(VllmEngine.create(str(model), dtype="float32", kv_cache_gib=0.25, **limits))
    else:
        from teacher_server.engines.transformers import TransformersEngine

        engine = TransformersEngine(str(model))
    yield engine
    run(engine.close())


@dataclass
class Served:
    """A server over an engine, and the parts of it that tests look into."""

    server: Server
    core: TeacherCore
    admin: WeightsAdmin
    metrics: Metrics
    spool: Path
    root: Path

    def connect(self, scheme: str) -> Teacher:
        return self.server.connect(scheme, token=SECRET)

    def folders(self) -> set[Path]:
        return set(self.spool.iterdir())


@asynccontextmanager
async def serving_weights(engine: WeightsEngine, model: Path, folder: Path) -> AsyncGenerator[Served, None]:
    """Up to two adapters, paths below `folder`/root; the engine has its own weights again at the end."""
    metrics = Metrics()
    teachers = Teachers(("base",), metrics.show_teachers)
    core = core_over(engine, model, teachers=teachers)
    spool, root = folder / "spool", folder / "root"
    spool.mkdir()
    root.mkdir()
    admin = WeightsAdmin(
        engine,
        teachers,
        ServedModel.find(str(model), None),
        spool=spool,
        root=root,
        max_adapters=2,
        max_lora_rank=MAX_RANK,
        died=core.dead.set,
    )
    server = await start_server(None, metrics, access=ACCESS)
    server.gate.open(core, admin=admin)
    await server.listeners.set_ready(True)
    try:
        yield Served(server, core, admin, metrics, spool, root)
    finally:
        await server.stop()
        for teacher in teachers.served:
            if teacher.kind == "adapter":
                await admin.unload(teacher.name)
        await until(lambda: not admin._retiring)
        await admin.close()
        if teachers.served[0].weights_version and not core.dead.is_set():
            await engine.load_weights([model / "model.safetensors"])
        core.close()


async def stream_model(teacher: Teacher, model: Path, version: int, **fields: Any) -> ServedTeacher:
    return await teacher.update_weights(
        WeightsUpdate("base", version, **fields), read_chunks(model / "model.safetensors")
    )


async def stream_adapter(teacher: Teacher, name: str, adapter: Path, version: int) -> ServedTeacher:
    update = WeightsUpdate(name, version, adapter_config=(adapter / "adapter_config.json").read_text())
    return await teacher.update_weights(update, read_chunks(adapter / "adapter_model.safetensors"))


def assert_rows(result: ScoreResult, expected: np.ndarray, *others: np.ndarray) -> None:
    """The expected rows, and clearly none of the others."""
    np.testing.assert_allclose(result.sampled_logprobs, expected, rtol=0, atol=ATOL)
    for other in others:
        assert np.abs(result.sampled_logprobs - other).max() > CLEARLY


def test_the_readme_updates_weights(run: LoopThread, engine: WeightsEngine, files: Files, tmp_path: Path) -> None:
    _, updating = python_blocks()

    async def scenario() -> None:
        async with serving_weights(engine, files.base, tmp_path) as served, served.connect("grpc") as teacher:
            path = files.other / "model.safetensors"
            names = {"teacher": teacher, "path": path, "items": (ITEM,), "ScoreRequest": ScoreRequest}
            await run_block(updating, **names)
            assert (await teacher.info()).served == (ServedTeacher("base", "model", 7),)

    run(scenario())


def test_items_choose_among_the_model_and_its_adapters(
    run: LoopThread, scheme: str, engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    """In one request, twice, so that the second time every prefix is cached, each under its own weights."""

    async def scenario() -> None:
        async with serving_weights(engine, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            await served.admin.serve_adapter("rlvr", files.adapters[0])
            await served.admin.serve_adapter("sft", files.adapters[1])
            info = await teacher.info()
            assert info.teachers == ("base", "rlvr", "sft")
            assert info.served == (
                ServedTeacher("base", "model", 0),
                ServedTeacher("rlvr", "adapter", 0),
                ServedTeacher("sft", "adapter", 0),
            )
            names = ["base", "rlvr", "sft", ""] * 3
            base, rlvr, sft = files.expected(), files.expected(adapter=0), files.expected(adapter=1)
            for _ in range(2):
                results = await teacher.score([replace(ITEM, teacher=name) for name in names])
                for name, result in zip(names, results, strict=True):
                    if name == "rlvr":
                        assert_rows(result, rlvr, base, sft)
                    elif name == "sft":
                        assert_rows(result, sft, base, rlvr)
                    else:
                        assert_rows(result, base, rlvr, sft)
            item = GenerateItem(CONTEXT, max_new_tokens=8, temperature=0.0, ignore_eos=True, teacher="rlvr")
            [written] = (await teacher.generate([item]))[0].samples
            # Greedy under the merged model: scoring what was written gives the log-probs it was written with.
            again = sampled_logprobs(merged_model(files.base, files.adapters[0]), CONTEXT, written.token_ids)
            np.testing.assert_allclose(written.logprobs, again, rtol=0, atol=ATOL)

    run(scenario())


def test_an_adapter_is_loaded_replaced_and_unloaded(
    run: LoopThread, scheme: str, engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving_weights(engine, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            item = replace(ITEM, teacher="rlvr")
            with pytest.raises(UnknownTeacher, match="served: base"):
                await teacher.score([item])
            old, new = files.expected(adapter=0), files.expected(adapter=2)

            assert await stream_adapter(teacher, "rlvr", files.adapters[0], 3) == ServedTeacher("rlvr", "adapter", 3)
            [result] = await teacher.score([item])
            assert result.weights_version == 3
            assert_rows(result, old, new, files.expected())

            (served.root / "step-4").symlink_to(files.adapters[2])
            with pytest.raises(PermissionDenied, match="not below the weights root"):
                await teacher.update_weights(WeightsUpdate("rlvr", 4, path="step-4"))
            (served.root / "step-4").unlink()
            copied = served.root / "step-4"
            copied.mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (copied / name).write_bytes((files.adapters[2] / name).read_bytes())
            assert (await teacher.update_weights(WeightsUpdate("rlvr", 4, path="step-4"))).weights_version == 4
            [result, again] = await teacher.score([item, item])
            assert result.weights_version == 4
            assert_rows(result, new, old)  # nothing of the old version's prefix cache
            assert_rows(again, new, old)
            await until(lambda: len(served.folders()) == 1)  # the old version's files are gone

            assert await teacher.unload("rlvr") == ServedTeacher("rlvr", "adapter", 4)
            with pytest.raises(UnknownTeacher, match="'rlvr'"):
                await teacher.score([item])
            with pytest.raises(UnknownTeacher, match="'rlvr'"):
                await teacher.unload("rlvr")
            with pytest.raises(Conflict, match="has had weights of version 4; version 4 is not above it"):
                await stream_adapter(teacher, "rlvr", files.adapters[0], 4)
            await until(lambda: not served.folders())

    run(scenario())


def test_the_model_s_weights_are_replaced_in_place(
    run: LoopThread, scheme: str, engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    """Streamed, then from a path; what was cached under the old weights is never read under the new ones."""

    async def scenario() -> None:
        async with serving_weights(engine, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            old, new = files.expected(), files.expected(model=files.other)
            for _ in range(2):  # the second finds its prefix in the cache
                assert_rows((await teacher.score([ITEM]))[0], old, new)

            assert await stream_model(teacher, files.other, 5) == ServedTeacher("base", "model", 5)
            info = await teacher.info()
            assert (info.weights_version, info.served[0].weights_version) == (5, 5)
            [result] = await teacher.score(ScoreRequest((ITEM,), min_weights_version=5))
            assert (result.weights_version, result.num_cached_tokens) == (5, 0)
            assert_rows(result, new, old)

            link = served.root / "latest.safetensors"
            link.write_bytes((files.base / "model.safetensors").read_bytes())
            await teacher.update_weights(WeightsUpdate("base", 6, path=str(link)))
            assert_rows((await teacher.score([ITEM]))[0], old, new)
            assert 'teacher_weights_version{teacher="base"} 6.0' in served.metrics.text().decode()

    run(scenario())


def test_no_result_is_a_mixture(
    run: LoopThread, scheme: str, engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    """Items stream in while the weights change six times: each result is whole and names the weights it is from."""

    async def scenario() -> None:
        async with serving_weights(engine, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            seen: set[int] = set()
            expected = (files.expected(), files.expected(model=files.other))
            stop = asyncio.Event()

            async def score() -> None:
                while not stop.is_set():
                    for result in await teacher.score([ITEM] * 3):
                        version = result.weights_version
                        assert_rows(result, expected[version % 2], expected[1 - version % 2])
                        seen.add(version)

            scorers = [asyncio.create_task(score()) for _ in range(3)]
            for version in range(1, 7):
                await until(lambda version=version: version - 1 in seen)
                # Odd versions are the other model's weights.
                await stream_model(teacher, files.other if version % 2 else files.base, version)
            await until(lambda: 6 in seen)
            stop.set()
            await asyncio.gather(*scorers)
            assert seen == set(range(7))

    run(scenario())


def test_a_mean_of_old_and_new_weights(
    run: LoopThread, scheme: str, engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    """Three updates against numpy: d · current + (1 - d) · incoming, the last on top of what the first two made."""

    async def scenario() -> None:
        mean = {name: tensor.numpy() for name, tensor in load_file(files.base / "model.safetensors").items()}
        incoming = [load_file(files.other / "model.safetensors"), load_file(files.base / "model.safetensors")]
        async with serving_weights(engine, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            for version, (decay, tensors) in enumerate(
                [(0.9, incoming[0]), (0.5, incoming[1]), (0.75, incoming[0])], 1
            ):
                update = WeightsUpdate("base", version, ema_decay=decay)
                await teacher.update_weights(update, one_chunk(save(tensors)))
                for name, current in mean.items():
                    mean[name] = np.float32(decay) * current + np.float32(1 - decay) * tensors[name].numpy()
                model = plain_model(files.base)
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(torch.from_numpy(mean[name]))
                [result] = await teacher.score([ITEM])
                assert result.weights_version == version
                np.testing.assert_allclose(
                    result.sampled_logprobs, sampled_logprobs(model, CONTEXT, COMPLETION), rtol=0, atol=1e-5
                )
            assert len(served.folders()) == 1  # the mean of now, and nothing of what led to it
            [file] = next(iter(served.folders())).iterdir()
            for name, tensor in load_file(file).items():
                np.testing.assert_allclose(tensor.numpy(), mean[name], rtol=1e-6, atol=1e-7)

    run(scenario())


async def one_chunk(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.fixture(scope="module")
def reference_engine(run: LoopThread, model: Path) -> Iterator[WeightsEngine]:
    """For what does not depend on the engine."""
    from teacher_server.engines.transformers import TransformersEngine

    engine = TransformersEngine(str(model))
    yield engine
    run(engine.close())


def test_a_request_waits_for_the_weights_it_asks_for(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            wants_1 = ScoreRequest((ITEM,), min_weights_version=1)
            with pytest.raises(Conflict) as caught:
                await teacher.score(wants_1)
            assert caught.value.field == "min_weights_version"
            assert caught.value.message == (
                "teacher 'base' has weights of version 0; version 1 was asked for and did not come"
            )
            with pytest.raises(Conflict, match=r"did not come within 0\.1 s"):
                await teacher.score(replace(wants_1, max_weights_wait_s=0.1))
            with pytest.raises(DeadlineExceeded):
                await teacher.score(replace(wants_1, max_weights_wait_s=60.0), timeout_s=0.3)
            with pytest.raises(InvalidRequest, match=r"max_weights_wait_s is -1\.0"):
                await teacher.score(replace(wants_1, max_weights_wait_s=-1.0))

            waiting = asyncio.create_task(teacher.score(replace(wants_1, max_weights_wait_s=60.0)))
            await asyncio.sleep(0.1)
            await stream_model(teacher, files.other, 1)
            [result] = await waiting
            assert result.weights_version == 1
            # Another teacher's version is its own.
            await stream_adapter_of(served, files)
            with pytest.raises(Conflict, match="teacher 'rlvr' has weights of version 0"):
                await teacher.score(ScoreRequest((ITEM, replace(ITEM, teacher="rlvr")), min_weights_version=1))

    run(scenario())


async def stream_adapter_of(served: Served, files: Files) -> None:
    await served.admin.serve_adapter("rlvr", files.adapters[0])


def tensors_of(files: Files) -> dict[str, torch.Tensor]:
    return load_file(files.base / "model.safetensors")


def changed(files: Files, **tensors: torch.Tensor | None) -> bytes:
    """The model's own file with some tensors replaced, added or (None) left out."""
    merged: dict[str, torch.Tensor | None] = {**tensors_of(files), **tensors}
    return save({name: tensor for name, tensor in merged.items() if tensor is not None})


NORM = "model.norm.weight"
HEAD = "lm_head.weight"
BAD_BYTES: dict[str, tuple[Any, type[TeacherError], str]] = {
    "missing": (lambda files: changed(files, **{NORM: None}), InvalidRequest, f"{NORM} is missing"),
    "unknown": (
        lambda files: changed(files, extra=torch.zeros(2)),
        InvalidRequest,
        "extra is not a tensor of the model",
    ),
    "shape": (
        lambda files: changed(files, **{NORM: torch.zeros(65)}),
        InvalidRequest,
        f"{NORM} is F32 [65]; the model has it as F32 [64]",
    ),
    "type": (
        lambda files: changed(files, **{NORM: torch.zeros(64, dtype=torch.float64)}),
        InvalidRequest,
        f"{NORM} is F64 [64]; the model has it as F32 [64]",
    ),
    "tied head": (
        lambda files: changed(files, **{HEAD: torch.zeros(304, 64)}),
        InvalidRequest,
        f"{HEAD} is not a tensor of the model",
    ),
    "pickle": (lambda _: pickle.dumps({"a": 1}), InvalidRequest, "not a whole safetensors file"),
    "cut off": (lambda files: changed(files)[:-5], InvalidRequest, "not a whole safetensors file"),
    "nothing": (lambda _: b"", InvalidRequest, "no bytes follow the header"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_weights_that_do_not_fit_change_nothing(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path, case: str
) -> None:
    make, kind, words = BAD_BYTES[case]

    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            with pytest.raises(kind) as caught:
                await teacher.update_weights(WeightsUpdate("base", 1), one_chunk(make(files)))
            assert words in caught.value.message
            [result] = await teacher.score([ITEM])
            assert result.weights_version == 0
            assert_rows(result, files.expected())
            assert not served.folders()

    run(scenario())


UPDATES: dict[str, tuple[WeightsUpdate, type[TeacherError], str, str]] = {
    "old version": (WeightsUpdate("base", 0), Conflict, "version", "of version 0; version 0 is not above it"),
    "unknown model": (WeightsUpdate("new", 1), UnknownTeacher, "teacher", "a new one must be a LoRA adapter"),
    "name": (WeightsUpdate("a/b", 1, adapter_config="{}"), InvalidRequest, "teacher", "cannot be a teacher's name"),
    "decay": (WeightsUpdate("base", 1, ema_decay=1.0), InvalidRequest, "ema_decay", "from 0 to below 1"),
    "path and config": (
        WeightsUpdate("base", 1, path="x", adapter_config="{}"),
        InvalidRequest,
        "adapter_config",
        "a path has its own",
    ),
    "path and bytes": (WeightsUpdate("base", 1, path="x"), InvalidRequest, "path", "send one of them"),
    "broken config": (
        WeightsUpdate("rlvr", 1, adapter_config="{}"),
        InvalidRequest,
        "adapter_config.peft_type",
        "Field required",
    ),
}


@pytest.mark.parametrize("case", UPDATES)
def test_a_wrong_header_is_one_clear_error(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path, case: str
) -> None:
    update, kind, field_name, words = UPDATES[case]

    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            with pytest.raises(kind) as caught:
                await teacher.update_weights(update, read_chunks(files.base / "model.safetensors"))
            assert caught.value.field == field_name
            assert words in caught.value.message
            assert (await teacher.info()).served == (ServedTeacher("base", "model", 0),)

    run(scenario())


def test_paths_are_confined(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            (served.root / "inside").mkdir()
            (served.root / "inside" / "model.safetensors").symlink_to(files.base / "model.safetensors")
            for path in ("..", str(files.base), "/etc/passwd", "inside"):
                with pytest.raises(PermissionDenied, match="not below the weights root"):
                    await teacher.update_weights(WeightsUpdate("base", 1, path=path))
            with pytest.raises(InvalidRequest, match="there is no 'gone'"):
                await teacher.update_weights(WeightsUpdate("base", 1, path="gone"))
            (served.root / "model.bin").write_bytes(pickle.dumps({}))
            with pytest.raises(InvalidRequest, match="nor a folder with"):
                await teacher.update_weights(WeightsUpdate("base", 1, path="model.bin"))
            assert not served.folders()

    run(scenario())


def test_an_error_in_the_middle_of_an_upload_is_the_server_s_own(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    """An upload without end is cut at the size that the model can have."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield bytes(2**20)

    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            num_numbers = sum(tensor.numel() for tensor in tensors_of(files).values())
            with pytest.raises(InvalidRequest) as caught:
                await teacher.update_weights(WeightsUpdate("base", 1), endless())
            # float32 is 4 bytes a number, and the longest header of the format has 100 MB.
            assert f"more than {100_000_000 + 4 * num_numbers} bytes" in caught.value.message
            assert not served.folders()
            assert (await teacher.score([ITEM]))[0].weights_version == 0

    run(scenario())


def test_a_caller_that_fails_or_leaves_changes_nothing(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    first = (files.other / "model.safetensors").read_bytes()[:1000]

    async def breaking() -> AsyncIterator[bytes]:
        yield first
        raise ZeroDivisionError("the caller's own")

    async def stalling() -> AsyncIterator[bytes]:
        yield first
        await asyncio.sleep(60)

    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            with pytest.raises(ZeroDivisionError):
                await teacher.update_weights(WeightsUpdate("base", 1), breaking())
            with pytest.raises(DeadlineExceeded):
                await teacher.update_weights(WeightsUpdate("base", 1), stalling(), timeout_s=0.5)
            await until(lambda: not served.folders())
            assert (await teacher.info()).weights_version == 0

    run(scenario())


def test_adapters_are_counted_and_pin_the_model(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            served.connect(scheme) as teacher,
        ):
            for i in range(2):
                await stream_adapter(teacher, f"a{i}", files.adapters[i], 1)
            with pytest.raises(Conflict, match="2 adapters are served, and this server takes 2"):
                await stream_adapter(teacher, "a2", files.adapters[2], 1)
            with pytest.raises(Conflict, match="unload them first"):
                await stream_model(teacher, files.other, 1)
            with pytest.raises(InvalidRequest, match="the kind of 'a0' is adapter; these are weights of a model"):
                await teacher.update_weights(WeightsUpdate("a0", 2), read_chunks(files.base / "model.safetensors"))
            with pytest.raises(InvalidRequest, match="only adapters can be unloaded"):
                await teacher.unload("base")

    run(scenario())


@dataclass
class Breaking(EngineOver[WeightsEngine]):
    """A real engine whose next loads of weights break off: half of the tensors are in by then."""

    num_breaking: int
    broken: Path
    closed: bool = field(default=False)

    async def score(self, task: ScoreTask) -> ScoreRows:
        if self.closed:
            raise EngineDeadError("closed")
        return await self.inner.score(task)

    async def load_weights(self, files: Sequence[Path]) -> None:
        if self.num_breaking:
            self.num_breaking -= 1
            files = [self.broken]
        await self.inner.load_weights(files)

    async def load_adapter(self, adapter: Adapter) -> None:
        await self.inner.load_adapter(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        await self.inner.unload_adapter(adapter)

    async def close(self) -> None:
        self.closed = True


def half_of(files: Files, folder: Path) -> Path:
    """Half of the other model's tensors and one of a wrong shape, at which loading breaks off."""
    tensors = load_file(files.other / "model.safetensors")
    half = dict(list(tensors.items())[: len(tensors) // 2])
    file = folder / "half.safetensors"
    save_file(half | {"model.norm.weight": torch.zeros(65)}, file)
    return file


def test_weights_that_break_off_are_put_back(
    run: LoopThread, scheme: str, engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        breaking = Breaking(engine, 1, half_of(files, tmp_path))
        async with serving_weights(breaking, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            with pytest.raises(EngineFailed, match=r"of version 1 could not be loaded .*served before were restored"):
                await stream_model(teacher, files.other, 1)
            [result] = await teacher.score([ITEM])
            assert result.weights_version == 0
            assert_rows(result, files.expected())
            assert not served.core.dead.is_set()
            await stream_model(teacher, files.other, 1)  # the same version again: it was never served
            assert_rows((await teacher.score([ITEM]))[0], files.expected(model=files.other))

    run(scenario())


def test_weights_that_cannot_be_put_back_are_never_served(
    run: LoopThread, scheme: str, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        breaking = Breaking(reference_engine, 2, half_of(files, tmp_path))
        async with serving_weights(breaking, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            with pytest.raises(EngineFailed, match="the engine was closed and this server is ending"):
                await stream_model(teacher, files.other, 1)
            assert served.core.dead.is_set()
            with pytest.raises(EngineFailed):
                await teacher.score([ITEM])
        await reference_engine.load_weights([files.base / "model.safetensors"])

    run(scenario())


def test_only_the_scope_admin_changes_weights(
    run: LoopThread, scheme: str, transformers_server: Server, transformers_engine: Engine, tiny_model: Path
) -> None:
    scorer = auth.Access((auth.Token("trainer", auth.sha256_of(SECRET), auth.OPEN_SCOPES),))

    async def refused(server: Server, words: str) -> None:
        async with server.connect(scheme, token=SECRET) as teacher:
            for change in (teacher.update_weights(WeightsUpdate("base", 1), one_chunk(b"x")), teacher.unload("base")):
                with pytest.raises(PermissionDenied, match=words):
                    await change

    async def scenario() -> None:
        await refused(transformers_server, "admin is off, because this server has no tokens")
        async with serving(core_over(transformers_engine, tiny_model), access=scorer) as server:
            await refused(server, "token 'trainer' lacks the scope admin")

    run(scenario())


def test_people_change_weights_in_json(
    run: LoopThread, reference_engine: WeightsEngine, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            serving_weights(reference_engine, files.base, tmp_path) as served,
            httpx.AsyncClient(
                base_url=served.server.listeners.http_url, headers={"authorization": f"Bearer {SECRET}"}
            ) as http,
        ):
            (served.root / "new.safetensors").write_bytes((files.other / "model.safetensors").read_bytes())
            answer = await http.put("/v1/teachers/base/weights", json={"version": 2, "path": "new.safetensors"})
            assert (answer.status_code, answer.json()) == (
                200,
                {"name": "base", "kind": "model", "weights_version": 2},
            )
            answer = await http.put("/v1/teachers/base/weights", json={"version": 1, "path": "new.safetensors"})
            assert (answer.status_code, answer.json()["error"]["name"]) == (409, "Conflict")
            answer = await http.put("/v1/teachers/base/weights", json={"version": 3})
            assert (answer.status_code, answer.json()["error"]["field"]) == (422, "path")
            assert (await http.delete("/v1/teachers/base")).status_code == 422
            assert (await http.delete("/v1/teachers/who")).status_code == 404
            assert json.loads((await http.get("/v1/info")).text)["served"][0]["weights_version"] == 2

    run(scenario())
