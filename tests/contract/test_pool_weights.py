"""New weights through a pool: every replica has them, or none, or the error says who failed."""

from __future__ import annotations

from collections.abc import AsyncIterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from protos.client import connect
from protos.errors import Conflict, NotReady
from protos.pool import PoolOptions, TeacherPool
from protos.records import ScoreItem, ScoreRequest, ServedTeacher, WeightsUpdate
from teacher_server.engines.transformers import TransformersEngine
from tests.harness import LoopThread, until
from tests.taking_weights import SECRET, serving_weights, stream_model
from tests.teacher_over import TeacherOver
from tests.tiny_model import build_tiny_qwen3

ITEMS = tuple(ScoreItem(np.array([1, i + 1], np.int32), np.array([7, 8], np.int32)) for i in range(4))
OPTIONS = PoolOptions(min_part_tokens=1, probe_interval_s=0.1)


class Loses(TeacherOver):
    """A replica whose next answers to new weights are lost on their way, and which has not got those."""

    num_lost = 0

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        if self.num_lost:
            self.num_lost -= 1
            raise NotReady("cut off")
        return await super().update_weights(update, chunks, timeout_s=timeout_s)


def test_what_one_replica_missed_is_sent_again_until_all_have_it(
    run: LoopThread, tiny_model: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    replicas: list[Loses] = []

    def connect_one(url: str) -> Loses:
        replicas.append(Loses(connect(url, token=SECRET)))
        return replicas[-1]

    async def scenario() -> None:
        engine = TransformersEngine(str(tiny_model))
        async with (
            serving_weights(engine, tiny_model, folders[0]) as a,
            serving_weights(engine, tiny_model, folders[1]) as b,
            TeacherPool(f"{a.server.url('grpc')},{b.server.url('grpc')}", connect_one, OPTIONS) as pool,
        ):
            await pool.info()
            replicas[1].num_lost = 2
            # The first has the weights from the first time on and refuses them; a sender must hear of the other.
            for error in (NotReady, NotReady, Conflict):
                with pytest.raises(error):
                    await stream_model(pool, tiny_model, 1)
            assert (await pool.info()).weights_version == 1
        await engine.close()

    run(scenario())


def test_every_replica_has_the_new_weights_or_none(run: LoopThread, tiny_model: Path, tmp_path: Path) -> None:
    other = build_tiny_qwen3(tmp_path, seed=7)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()

    async def scenario() -> None:
        engines = [TransformersEngine(str(tiny_model)) for _ in folders]
        async with (
            serving_weights(engines[0], tiny_model, folders[0]) as a,
            serving_weights(engines[1], tiny_model, folders[1]) as b,
            TeacherPool(
                f"{a.server.url('grpc')},{b.server.url('http')}", partial(connect, token=SECRET), OPTIONS
            ) as pool,
        ):
            before = await pool.score(ITEMS)
            assert (await stream_model(pool, other, 1)).weights_version == 1
            for served in (a, b):
                async with served.connect("grpc") as alone:
                    assert (await alone.info()).weights_version == 1
            after = await pool.score(ScoreRequest(ITEMS, min_weights_version=1))
            assert {result.weights_version for result in after} == {1}
            for old, new in zip(before, after, strict=True):
                assert np.abs(old.sampled_logprobs - new.sampled_logprobs).max() > 0.01

            with pytest.raises(Conflict, match=a.server.url("grpc")):
                await stream_model(pool, tiny_model, 1)

            b.server.gate.close("draining")
            await until(lambda: pool.stats().replicas[1].refusal)
            with pytest.raises(NotReady, match="so no replica was changed"):
                await stream_model(pool, tiny_model, 2)
            async with a.connect("grpc") as alone:
                assert (await alone.info()).weights_version == 1
        for engine in engines:
            await engine.close()

    run(scenario())
