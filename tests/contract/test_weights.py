"""Adapters and weights that change under a serving engine, over {http, grpc} x {transformers, vllm}."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from protos.errors import Conflict, EngineFailed, PermissionDenied, UnknownTeacher
from protos.records import GenerateItem, ScoreRequest, ServedTeacher, WeightsUpdate
from teacher_server.engines.base import EngineDeadError, ScoreRows, ScoreTask, WeightsEngine
from teacher_server.engines.transformers import TransformersEngine
from tests.harness import LoopThread, until
from tests.lora import merged_model
from tests.readme import python_blocks, run_block
from tests.reference import plain_model, sampled_logprobs
from tests.taking_weights import (
    ATOL,
    COMPLETION,
    CONTEXT,
    ITEM,
    MAX_ADAPTERS,
    MAX_RANK,
    Files,
    WeightsEngineOver,
    assert_rows,
    one_chunk,
    serving_weights,
    stream_adapter,
    stream_model,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.build(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, run: LoopThread, files: Files) -> Iterator[WeightsEngine]:
    """An engine of this file's own, which the tests change and put back."""
    if request.param == "vllm":
        from teacher_server.engines.vllm import VllmEngine

        limits: dict[str, Any] = {"max_adapters": MAX_ADAPTERS, "max_lora_rank": MAX_RANK}
        engine = run(VllmEngine.create(str(files.base), dtype="float32", kv_cache_gib=0.25, **limits))
    else:
        engine = TransformersEngine(str(files.base))
    yield engine
    run(engine.close())


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


@dataclass
class Breaking(WeightsEngineOver):
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
    run: LoopThread, scheme: str, files: Files, tmp_path: Path
) -> None:
    async def scenario() -> None:
        engine = TransformersEngine(str(files.base))
        breaking = Breaking(engine, 2, half_of(files, tmp_path))
        async with serving_weights(breaking, files.base, tmp_path) as served, served.connect(scheme) as teacher:
            with pytest.raises(EngineFailed, match="the engine was closed and this server is ending"):
                await stream_model(teacher, files.other, 1)
            assert served.core.dead.is_set()
            with pytest.raises(EngineFailed):
                await teacher.score([ITEM])
        await engine.close()

    run(scenario())
