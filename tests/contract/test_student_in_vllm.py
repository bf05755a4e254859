"""vLLM over the toy model: with the student's weights, sent before each step, it writes the rollouts or teaches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from student_trainer.config import parse_config
from student_trainer.learner import Learner
from student_trainer.stages import build_stage
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import build_task
from tests.contract.test_moving_teacher import CLEARLY, DECAY, config_of, running, said_by, told_nothing
from tests.harness import LoopThread, Server, server_of
from tests.taking_weights import SECRET, serving_weights

if TYPE_CHECKING:
    from teacher_server.engines.vllm import VllmEngine

pytestmark = pytest.mark.slow

ATOL = 1e-4
"""Nats between vLLM's float32 forward and the trainer's of the same weights."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def engine(run: LoopThread, model: Path) -> Iterator[VllmEngine]:
    """One vLLM for the file."""
    from teacher_server.engines.vllm import VllmEngine

    engine = run(VllmEngine.create(str(model), dtype="float32", kv_cache_gib=0.25))
    yield engine
    run(engine.close())


@pytest.fixture(scope="module")
def served(
    run: LoopThread, engine: VllmEngine, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for the file; each test goes on from the version that the one before left."""
    with run.entered(serving_weights(engine, model, tmp_path_factory.mktemp("server"))) as served:
        yield served.server


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)


def version_of(run: LoopThread, server: Server) -> int:
    async def ask() -> int:
        async with server.connect("grpc", token=SECRET) as teacher:
            return (await teacher.info()).weights_version

    return run(ask())


def test_rollouts_of_two_steps_are_those_of_the_weights_of_now(
    run: LoopThread, served: Server, model: Path, tmp_path: Path
) -> None:
    """Another server teaches; the one that writes has a version more after each step."""
    other = build_toy_model(tmp_path / "teacher", hidden_size=32, num_layers=1, seed=1)
    with server_of(run, other) as teacher:
        tables = config_of(model, teacher.url("grpc"), tmp_path / "run").model_dump(exclude_none=True)
        tables["stage"] = {"kind": "opd", "loss": {"top_k": 5}}
        tables["rollout"]["url"] = served.url("grpc")
        config = parse_config(tables)
        (tmp_path / "run").mkdir()
        student, first = load_student(config.model), load_student(config.model)
        stage = build_stage(config, student, build_task(config.task))
        learner = Learner.build(student, config)
        before = version_of(run, served)
        with closing(stage):
            for step in range(2):
                collected = stage.collect(step)
                assert version_of(run, served) == before + step + 1
                batch = collected.batch
                assert batch.sampled_logp_BT is not None
                now, start_of_run = (
                    said_by(each.model, collected).gather(-1, batch.completion_ids_BT[..., None])[..., 0][batch.mask_BT]
                    for each in (student, first)
                )
                sampled = batch.sampled_logp_BT[batch.mask_BT]
                np.testing.assert_allclose(sampled, now, rtol=0, atol=ATOL)
                assert step == 0 or (sampled - start_of_run).abs().max() > CLEARLY
                learner.step(stage, collected)


@pytest.mark.parametrize("stage", [{"teacher": "live"}, {"teacher": "ema", "ema_decay": DECAY}], ids=["live", "ema"])
def test_a_moving_teacher_says_what_its_weights_say(
    run: LoopThread, served: Server, model: Path, tmp_path: Path, stage: dict[str, Any]
) -> None:
    """Told nothing it is the student of the step, or the mean d theta_0 + (1 - d) theta_1, one version a step."""
    config = config_of(model, served.url("grpc"), tmp_path / "run", **stage)
    expected = load_student(config.model).model
    before = version_of(run, served)
    with running(config) as (learner, opsd):
        for step in range(2):
            collected = opsd.collect(step)
            ahead = 1 - DECAY if stage["teacher"] == "ema" and step > 0 else 1.0
            for p, theta in zip(expected.parameters(), learner.student.model.parameters(), strict=True):
                p.data.lerp_(theta.data, ahead)
            logp_BTV, mask_BT, versions = told_nothing(served.url("grpc"), collected)
            assert versions == {before + step + 1} == {collected.metrics["teacher_version"]}
            np.testing.assert_allclose(logp_BTV[mask_BT], said_by(expected, collected)[mask_BT], rtol=0, atol=ATOL)
            if step > 0 and stage["teacher"] == "ema":
                assert (logp_BTV - said_by(learner.student.model, collected))[mask_BT].abs().max() > CLEARLY
            learner.step(opsd, collected)


def test_a_tokenizer_without_an_unknown_token_has_its_stock_routes(run: LoopThread, engine: VllmEngine) -> None:
    """vLLM encodes a letter that the toy world does not have while it prepares a route that is not served here."""

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(await engine.openai_app(("base",)))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
            messages = [{"role": "user", "content": "3+5"}]
            return [
                await http.post("/v1/completions", json={"model": "base", "prompt": "3+5:", "max_tokens": 2}),
                await http.post("/v1/chat/completions", json={"model": "base", "messages": messages}),
            ]

    completion, chat = run(scenario())
    assert completion.json()["usage"]["prompt_tokens"] == 4
    assert chat.json()["usage"]["prompt_tokens"] == 1 + 4  # <bos>3+5:
