"""`teacher.name`: one of the teachers that a server has, as the trainer asks it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protos.errors import UnknownTeacher
from student_trainer.scoring import Scorer, Wanted
from student_trainer.teacher_identity import TeacherIdentity
from teacher_server.engines.transformers import TransformersEngine
from tests.contract.test_scorer import rollout
from tests.harness import LoopThread
from tests.lora import build_adapter, merged_model
from tests.reference import plain_model, sampled_logprobs
from tests.taking_weights import ATOL, SECRET, serving_weights


@pytest.fixture
def engine(run: LoopThread, tiny_model: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(tiny_model))
    yield engine
    run(engine.close())


def test_a_named_teacher_is_asked_and_no_other(
    run: LoopThread, engine: TransformersEngine, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)
    adapter = build_adapter(tmp_path, tiny_model, seed=1)
    one = rollout(6)
    expected = {
        name: sampled_logprobs(model, one.prompt_ids, one.completion_ids)
        for name, model in (("base", plain_model(tiny_model)), ("rlvr", merged_model(tiny_model, adapter)))
    }
    assert np.abs(expected["base"] - expected["rlvr"]).max() > 0.1

    def ask(url: str) -> None:
        for name, answers in ((None, "base"), ("base", "base"), ("rlvr", "rlvr")):
            with Scorer(url, temperature=1.0, timeout_s=60, name=name) as scorer:
                [result] = scorer.score([one], Wanted())
                assert TeacherIdentity.of(scorer.info).teacher == answers
            np.testing.assert_allclose(result.sampled_logprobs, expected[answers], rtol=0, atol=ATOL)
        with pytest.raises(
            UnknownTeacher, match=r"teacher\.name is 'rl', which this server does not have; it has base, "
        ):
            Scorer(url, temperature=1.0, timeout_s=60, name="rl")

    async def scenario() -> None:
        async with serving_weights(engine, tiny_model, tmp_path) as served:
            await served.admin.serve_adapter("rlvr", adapter)
            await asyncio.to_thread(ask, served.server.url("grpc"))

    run(scenario())
