"""Rollouts from a server process that runs the student's weights: what it writes is what the student of now would."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
import torch

from protos.errors import InvalidRequest, PermissionDenied
from student_trainer.collate import completion_logits
from student_trainer.config import ModelConfig, parse_config
from student_trainer.learner import Learner
from student_trainer.losses import log_probs
from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.remote import RemoteSampler
from student_trainer.scoring import TeacherMismatch
from student_trainer.stages import build_stage
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import ToyTask, build_task
from tests.harness import LoopThread, served
from tests.server_process import TINY_TRANSFORMERS, ServerProcess
from tests.tiny_model import build_tiny_qwen3

pytestmark = pytest.mark.slow

PARAMS = SamplingParams(max_new_tokens=6, temperature=0.7, num_samples=2, top_ids=5)
SCOPES = {"trainer": ["score", "generate", "admin"], "reader": ["score", "generate"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("student"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def url(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("server")
    tokens = folder / "tokens.toml"
    tokens.write_text(
        "".join(
            f'[{name}]\nsha256 = "{sha256(name.encode()).hexdigest()}"\nscopes = {scopes}\n'
            for name, scopes in SCOPES.items()
        )
    )
    flags = (*TINY_TRANSFORMERS, "--tokens", str(tokens))
    with ServerProcess(model, folder, *flags) as server:
        yield server.ready["grpc_url"]


@pytest.fixture(scope="module")
def teacher_url(run: LoopThread, tmp_path_factory):
    model = build_toy_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, num_layers=1, seed=1)
    with served(run, model) as url:
        yield url


@pytest.fixture
def problems():
    return build_task(ToyTask(train_size=50, held_out_size=10)).train[:4]


def sampler_of(url, path):
    return RemoteSampler(url, load_student(ModelConfig(path=str(path))), max_context_tokens=64, timeout_s=60)


def test_after_each_of_two_steps_rollouts_are_those_of_the_weights_of_now(
    tmp_path, monkeypatch, model, url, teacher_url
):
    """The teacher is another server, whose weights stay: the one that writes is sent new ones at every step."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("TEACHER_TOKEN", "trainer")
    config = parse_config(
        {
            "run": str(tmp_path / "run"),
            "steps": 3,
            "problems_per_step": 4,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
            "stage": {"kind": "opd", "loss": {"top_k": 5}},
            "teacher": {"url": teacher_url},
            "rollout": {"url": url, "max_new_tokens": 6, "temperature": 0.7},
            "optim": {"lr": 3e-2, "warmup_steps": 0},
        }
    )
    student = load_student(config.model)
    initial = load_student(config.model).model
    stage = build_stage(config, student, build_task(config.task))
    learner = Learner.build(student, config)
    try:
        for step in range(3):
            collected = stage.collect(step)
            batch = collected.batch
            assert batch.sampled_logp_BT is not None
            assert batch.student_top_BTK is not None
            student.model.eval()
            with torch.no_grad():
                now, first = (log_probs(completion_logits(m, batch), 0.7) for m in (student.model, initial.eval()))
            sampled_now, sampled_first = (
                logp.gather(-1, batch.completion_ids_BT[..., None])[..., 0][batch.mask_BT] for logp in (now, first)
            )
            sampled = batch.sampled_logp_BT[batch.mask_BT]
            np.testing.assert_allclose(sampled, sampled_now, rtol=0, atol=1e-4)
            assert (sampled - sampled_first).abs().max() > 0.05 or step == 0
            # Ties of a nearly uniform model may swap ids: the log-probs of the top 5 are what must agree.
            top = now.gather(-1, batch.student_top_BTK.clamp_min(0))[batch.mask_BT]
            np.testing.assert_allclose(top, now.topk(5).values[batch.mask_BT], rtol=0, atol=1e-4)
            learner.step(stage, collected)
    finally:
        stage.close()


def test_equal_seeds_equal_rollouts_grouped_by_problem(monkeypatch, model, url, problems):
    monkeypatch.setenv("TEACHER_TOKEN", "trainer")
    sampler = sampler_of(url, model)
    try:
        first, again = (sampler.sample(problems, PARAMS, seeds=[1, 2, 3, 4]) for _ in range(2))
        parts = list(sampler.stream(problems, PARAMS, seeds=[1, 2, 3, 4]))
    finally:
        sampler.close()
    assert [rollout.problem.id for rollout in first] == [p.id for p in problems for _ in range(2)]
    assert [r.completion_ids.tolist() for r in first] == [r.completion_ids.tolist() for r in again]
    assert all(rollout.top_ids.shape == (len(rollout.completion_ids), 5) for rollout in first)
    # A problem's samples are handed over as soon as they are there; the server writes one problem after the other.
    assert sorted(sorted(part) for part in parts) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    streamed = {place: rollout.completion_ids.tolist() for part in parts for place, rollout in part.items()}
    assert streamed == {place: rollout.completion_ids.tolist() for place, rollout in enumerate(first)}


def test_a_token_without_admin_scope_is_one_sentence(monkeypatch, model, url, problems):
    monkeypatch.setenv("TEACHER_TOKEN", "reader")
    sampler = sampler_of(url, model)
    try:
        with pytest.raises(PermissionDenied, match="TEACHER_TOKEN has no admin scope there"):
            sampler.sample(problems, PARAMS, seeds=[1, 2, 3, 4])
    finally:
        sampler.close()


def test_a_server_of_another_model_is_refused(tmp_path, monkeypatch, model, url, problems):
    monkeypatch.setenv("TEACHER_TOKEN", "trainer")
    with pytest.raises(TeacherMismatch, match="vocabularies"):
        sampler_of(url, build_tiny_qwen3(tmp_path))
    wider = sampler_of(url, build_toy_model(tmp_path / "wider", hidden_size=64, num_layers=1))
    try:
        with pytest.raises(InvalidRequest, match="which the student's weights do not fit"):
            wider.sample(problems, PARAMS, seeds=[1, 2, 3, 4])
    finally:
        wider.close()
