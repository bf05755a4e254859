"""Real servers that take other weights from whoever holds their token, and what tests send them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protos.client import Teacher, read_chunks
from protos.records import ScoreItem, ScoreResult, ServedTeacher, WeightsUpdate
from teacher_server import auth
from teacher_server.core import TeacherCore
from teacher_server.engines.base import Adapter, WeightsEngine
from teacher_server.engines.transformers import TransformersEngine
from teacher_server.metrics import Metrics
from teacher_server.served_model import ServedModel
from teacher_server.teachers import Teachers
from teacher_server.weights import WeightsAdmin
from tests.harness import EngineOver, Server, core_over, start_server, until
from tests.lora import build_adapter, merged_model
from tests.reference import plain_model, sampled_logprobs
from tests.tiny_model import build_tiny_qwen3

SECRET = "of-whoever-changes-weights"
ACCESS = auth.Access((auth.Token("operator", auth.sha256_of(SECRET), frozenset(auth.SCOPES)),))
MAX_ADAPTERS = 2
MAX_RANK = 8

ATOL = 1e-4
"""Nats between an adapter applied beside the weights and merged into them, in float32."""

CLEARLY = 0.1
"""Nats by which other weights differ at least; those of `Files` differ by more than one."""

CONTEXT = np.arange(40, 140, dtype=np.int32)
COMPLETION = np.arange(200, 230, dtype=np.int32)
ITEM = ScoreItem(CONTEXT, COMPLETION)


@dataclass(frozen=True)
class Files:
    """What the tests put into a server, each with a transformers model that answers as the server should."""

    base: Path
    other: Path
    adapters: tuple[Path, Path, Path]

    @classmethod
    def build(cls, folder: Path) -> Files:
        """With a tied LM head, as most small models have it, and as loading in place gets it wrong."""
        base, other = (build_tiny_qwen3(folder, seed=seed, tied=True) for seed in (0, 7))
        adapters = (
            build_adapter(folder, base, seed=1),
            build_adapter(folder, base, seed=2, targets=("q_proj", "up_proj"), r=MAX_RANK),
            build_adapter(folder, base, seed=3, use_rslora=True),
        )
        return cls(base, other, adapters)

    def expected(self, *, adapter: int | None = None, model: Path | None = None) -> np.ndarray:
        """float32 [T] for ITEM."""
        merged = plain_model(model or self.base) if adapter is None else merged_model(self.base, self.adapters[adapter])
        return sampled_logprobs(merged, CONTEXT, COMPLETION)


def assert_rows(result: ScoreResult, expected: np.ndarray, *others: np.ndarray) -> None:
    """The expected rows of ITEM, and clearly none of the others."""
    np.testing.assert_allclose(result.sampled_logprobs, expected, rtol=0, atol=ATOL)
    for other in others:
        assert np.abs(result.sampled_logprobs - other).max() > CLEARLY


@dataclass
class TakingWeights:
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
async def serving_weights(engine: WeightsEngine, model: Path, folder: Path) -> AsyncGenerator[TakingWeights, None]:
    """Serves `model` until it is sent others, whose paths are below `folder`/root, and adapters of up to MAX_RANK.

    The engine has its own weights again at the end.
    """
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
        max_adapters=MAX_ADAPTERS,
        max_lora_rank=MAX_RANK,
        died=core.dead.set,
    )
    server = await start_server(None, metrics, access=ACCESS)
    server.gate.open(core, admin=admin)
    await server.listeners.set_ready(True)
    try:
        yield TakingWeights(server, core, admin, metrics, spool, root)
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


@asynccontextmanager
async def taking_weights(
    model: Path, folder: Path, engine: TransformersEngine | None = None
) -> AsyncGenerator[Server, None]:
    """Such a server over a transformers engine of its own, by default a plain one; `folder` is empty."""
    engine = engine or TransformersEngine(str(model))
    try:
        async with serving_weights(engine, model, folder) as served:
            yield served.server
    finally:
        await engine.close()


async def stream_model(teacher: Teacher, model: Path, version: int) -> ServedTeacher:
    return await teacher.update_weights(WeightsUpdate("base", version), read_chunks(model / "model.safetensors"))


async def stream_adapter(teacher: Teacher, name: str, adapter: Path, version: int) -> ServedTeacher:
    update = WeightsUpdate(name, version, adapter_config=(adapter / "adapter_config.json").read_text())
    return await teacher.update_weights(update, read_chunks(adapter / "adapter_model.safetensors"))


async def one_chunk(data: bytes) -> AsyncIterator[bytes]:
    yield data


class WeightsEngineOver(EngineOver[WeightsEngine]):
    """A real engine behind another, which its subclasses make different in one way, its weights' changes included."""

    async def load_weights(self, files: Sequence[Path]) -> None:
        await self.inner.load_weights(files)

    async def load_adapter(self, adapter: Adapter) -> None:
        await self.inner.load_adapter(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        await self.inner.unload_adapter(adapter)
