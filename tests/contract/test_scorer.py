"""The trainer's side of a teacher: one server or a pool by URL alone, and nothing left behind when there is none."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from protos.errors import NotReady
from protos.records import Message, TeacherInfo
from student_trainer.config import parse_config
from student_trainer.rollout.base import Rollout
from student_trainer.scoring import Scorer, TeacherMismatch, Wanted
from student_trainer.stages import build_stage
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import Problem, build_task
from teacher_server.admission import Admission
from teacher_server.core import TeacherCore
from teacher_server.engines.base import Engine
from teacher_server.teachers import Teachers
from teacher_server.tokenizer import ChatTokenizer
from tests.harness import LoopThread, Server, start_server
from tests.tiny_model import byte_tokenizer

PROBLEM = Problem("1", (Message("user", "2+2?"),), "4")


def rollout(length: int) -> Rollout:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Rollout(PROBLEM, ids, ids, np.zeros(length, np.float32), ids[:, None], is_finished=True, text="")


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "teacher-client"]


def test_a_pool_scores_as_its_replicas_do(run: LoopThread, transformers_server: Server) -> None:
    # 100 rollouts are two requests, since the server takes 64 items at a time.
    rollouts = [rollout(1 + i % 7) for i in range(100)]
    wanted = Wanted(teacher_top_k=3, student_top_k=1)
    answers = []
    for scheme in ("grpc", "pool"):
        with Scorer(transformers_server.url(scheme), temperature=0.7, timeout_s=60) as scorer:
            answers.append(scorer.score(rollouts, wanted))
    for alone, pooled in zip(*answers, strict=True):
        np.testing.assert_array_equal(alone.top_logprobs, pooled.top_logprobs)
        np.testing.assert_array_equal(alone.candidate_logprobs, pooled.candidate_logprobs)
    assert not client_threads()


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1", "grpc://127.0.0.1:1,http://127.0.0.1:2"])
def test_a_teacher_that_is_away_leaves_no_thread_and_no_descriptor(url: str) -> None:
    def attempt() -> int:
        with pytest.raises(NotReady):
            Scorer(url, temperature=1.0, timeout_s=5)
        assert not client_threads()
        return len(os.listdir("/proc/self/fd"))

    first = attempt()
    assert max(attempt() for _ in range(3)) <= first


class Older(TeacherCore):
    """A core of before the contract had versions."""

    async def info(self) -> TeacherInfo:
        return replace(await super().info(), contract_version=0)


@pytest.mark.parametrize("scheme", ["http", "grpc", "pool"])
def test_an_older_server_is_named_before_it_is_asked_for_what_it_does_not_know(
    run: LoopThread, transformers_engine: Engine, tiny_model: Path, scheme: str
) -> None:
    tokenizer = ChatTokenizer.load(str(tiny_model))

    async def start() -> Server:
        teachers, admission = Teachers(("base",)), Admission(2**20, 2**20)
        return await start_server(Older(transformers_engine, tokenizer, admission, teachers=teachers, max_items=64))

    server = run(start())
    try:
        with Scorer(server.url(scheme), temperature=1.0, timeout_s=60) as scorer:
            student, shake = scorer.info.tokenizer, partial(scorer.handshake, tokenizer=byte_tokenizer())
            shake(student, Wanted(student_top_k=1), 100)
            with pytest.raises(TeacherMismatch, match=r"speaks version 0 .* need version 1: update the server$"):
                shake(student, Wanted(vocab_size=student.vocab_size), 100)
    finally:
        run(server.stop())


def test_a_teacher_that_does_not_fit_is_let_go(
    run: LoopThread, transformers_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)
    config = parse_config(
        {
            "run": "unused",
            "steps": 1,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 20, "held_out_size": 10},
            # The longest prompt is <bos>, five digits, four signs and the colon: 11. With 61 tokens of a system message
            # and 200 to write it is 272; without what the teacher is told it would have fitted.
            "stage": {"kind": "opd", "privileged": {"kind": "system", "text": "R" * 60}},
            "rollout": {"max_new_tokens": 200},
            "teacher": {"url": transformers_server.url("grpc")},
        }
    )
    with pytest.raises(TeacherMismatch, match="vocabularies") as caught:
        build_stage(config, load_student(config.model), build_task(config.task))
    assert "privileged information and completion tokens: 272 needed, the teacher takes at most 256" in str(
        caught.value
    )
    assert not client_threads()
