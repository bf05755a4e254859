"""Other weights for a serving engine: what is refused and leaves what is served as it was, from whom, and who waits."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from protos.client import read_chunks
from protos.errors import Conflict, DeadlineExceeded, InvalidRequest, PermissionDenied, TeacherError, UnknownTeacher
from protos.records import ScoreRequest, ServedTeacher, WeightsUpdate
from teacher_server import auth
from teacher_server.engines.base import Engine, WeightsEngine
from teacher_server.engines.transformers import TransformersEngine
from tests.harness import LoopThread, Server, core_over, serving, until
from tests.taking_weights import (
    ITEM,
    SECRET,
    Files,
    assert_rows,
    one_chunk,
    serving_weights,
    stream_adapter,
    stream_model,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.build(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def reference_engine(run: LoopThread, files: Files) -> Iterator[WeightsEngine]:
    """For what does not depend on the engine."""
    engine = TransformersEngine(str(files.base))
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
            await served.admin.serve_adapter("rlvr", files.adapters[0])
            with pytest.raises(Conflict, match="teacher 'rlvr' has weights of version 0"):
                await teacher.score(ScoreRequest((ITEM, replace(ITEM, teacher="rlvr")), min_weights_version=1))

    run(scenario())


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
