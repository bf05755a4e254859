"""A teacher that is the student itself, live or on the average, in a real server over a real socket."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from protos.client import read_chunks
from protos.errors import Conflict
from protos.records import WeightsUpdate
from student_trainer import checkpoint
from student_trainer.collate import completion_logits
from student_trainer.config import ConfigError, TrainConfig, parse_config
from student_trainer.learner import Learner
from student_trainer.loop import train
from student_trainer.losses import log_probs, reverse_kl
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.run_folder import read_rows
from student_trainer.scoring import Scorer, Wanted
from student_trainer.stages import Collected, build_stage
from student_trainer.stages.opd import Opd, collate_scored
from student_trainer.stages.opsd import Opsd, RunningMean
from student_trainer.student import load_student
from student_trainer.study.toy import VOCABULARY, build_toy_model
from student_trainer.tasks import Problem, build_task
from teacher_server.engines.base import ScoreRows, ScoreTask
from teacher_server.engines.transformers import TransformersEngine
from tests.chaos_proxy import ChaosProxy
from tests.harness import LoopThread, Server
from tests.taking_weights import SECRET, taking_weights

TIMES = {"rollout_s", "score_s", "step_s", "scored_tokens_per_s", "watch_s", "send_weights_s"}
V = len(VOCABULARY)
TEMPERATURE = 0.7
DECAY = 0.75

ATOL = 1e-4
"""Nats between two float32 forwards of the same weights over differently padded batches."""

CLEARLY = 0.01
"""Nats by which other weights differ at least: a step of these tests moves log-probs by some hundredths."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


@pytest.fixture
def started(run: LoopThread, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a server of the start's weights that takes others, each time it is called."""
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)
    with ExitStack() as stack:

        def start(engine: TransformersEngine | None = None) -> Server:
            folder = tmp_path / f"server-{len(list(tmp_path.glob('server-*')))}"
            folder.mkdir()
            return stack.enter_context(run.entered(taking_weights(model, folder, engine)))

        yield start


def config_of(model: Path, url: str, folder: Path, **stage: Any) -> TrainConfig:
    return parse_config(
        {
            "run": str(folder),
            "steps": 6,
            "problems_per_step": 4,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
            "teacher": {"url": url},
            "stage": {"kind": "opsd", "privileged": {"kind": "user_suffix", "text": "{answer}"}, **stage},
            "rollout": {"max_new_tokens": 6, "temperature": TEMPERATURE},
            "optim": {"lr": 1e-2, "warmup_steps": 0},
            "eval": {"num_problems": 4},
            "checkpoint": {"every_steps": 2, "keep": 10},
        }
    )


@contextmanager
def running(config: TrainConfig) -> Iterator[tuple[Learner, Opsd]]:
    """A student, and the stage that teaches it."""
    Path(config.run).mkdir()
    student = load_student(config.model)
    stage = build_stage(config, student, build_task(config.task))
    assert isinstance(stage, Opsd)
    try:
        yield Learner.build(student, config), stage
    finally:
        stage.close()


def told_nothing(url: str, collected: Collected) -> tuple[torch.Tensor, torch.Tensor, set[int]]:
    """What the server says of the step's rollouts without privileged information: the log-probs of the whole vocabulary
    [N, V], whether each of the N tokens is there, and the versions that answered.
    """
    with Scorer(url, temperature=TEMPERATURE, timeout_s=60) as scorer:
        results = scorer.score(collected.rollouts, Wanted(vocab_size=V))
    batch = collate_scored(collected.rollouts, results)
    assert batch.teacher_candidate_logp_BTM is not None
    logp_BTV = torch.where(batch.mask_BT[..., None], batch.teacher_candidate_logp_BTM, 0.0)
    return logp_BTV, batch.mask_BT, {result.weights_version for result in results}


@torch.no_grad()
def said_by(model: Any, collected: Collected) -> torch.Tensor:
    model.eval()
    return log_probs(completion_logits(model, collected.batch), TEMPERATURE)


def test_a_live_teacher_that_is_told_nothing_is_the_student_of_every_step(
    model: Path, started: Any, tmp_path: Path
) -> None:
    url = started().url("grpc")
    config = config_of(model, url, tmp_path / "run", teacher="live")
    first = load_student(config.model).model
    with running(config) as (learner, stage):
        for step in range(3):
            collected = stage.collect(step)
            logp_BTV, mask_BT, versions = told_nothing(url, collected)
            assert versions == {step + 1} == {collected.metrics["teacher_version"]}
            kl = reverse_kl(said_by(learner.student.model, collected), logp_BTV)[mask_BT]
            assert kl.abs().max() < 1e-6  # KL(p || p) = 0
            if step > 0:  # and no longer the start's
                assert reverse_kl(said_by(first, collected), logp_BTV)[mask_BT].max() > 1e-4
            # Told the answer, it is another distribution: there is something to learn.
            assert collected.batch.teacher_logp_BT is not None
            assert collected.batch.sampled_logp_BT is not None
            gap = collected.batch.teacher_logp_BT - collected.batch.sampled_logp_BT
            assert gap[mask_BT].abs().max() > CLEARLY
            learner.step(stage, collected)


def test_a_mean_teacher_follows_theta_as_the_recursion_says(model: Path, started: Any, tmp_path: Path) -> None:
    """theta'_0 = theta_0, theta'_s = d theta'_(s-1) + (1 - d) theta_s, in float64 beside the run."""
    url = started().url("grpc")
    config = config_of(model, url, tmp_path / "run", teacher="ema", ema_decay=DECAY)
    reference = load_student(config.model).model
    mean = {name: p.detach().double().clone() for name, p in reference.named_parameters()}
    with running(config) as (learner, stage):
        for step in range(4):
            collected = stage.collect(step)
            for name, p in learner.student.model.named_parameters():
                mean[name] = DECAY * mean[name] + (1 - DECAY) * p.detach().double()
            with torch.no_grad():
                for name, p in reference.named_parameters():
                    p.copy_(mean[name])
            logp_BTV, mask_BT, _ = told_nothing(url, collected)
            torch.testing.assert_close(logp_BTV[mask_BT], said_by(reference, collected)[mask_BT], rtol=0, atol=ATOL)
            if step > 0:
                ahead = said_by(learner.student.model, collected)
                assert (logp_BTV - ahead)[mask_BT].abs().max() > CLEARLY
            learner.step(stage, collected)


def test_a_step_counts_once_in_the_mean_which_is_finer_than_the_weights() -> None:
    zero, four = ({"w": torch.tensor([value])} for value in (0.0, 4.0))
    mean = RunningMean(0.75)
    assert mean.at(0, zero)["w"].item() == 0.0
    assert mean.at(1, four)["w"].item() == 1.0  # 0.75 * 0 + 0.25 * 4
    assert mean.at(1, four)["w"].item() == 1.0  # asked for again, by a server that was started anew
    resumed = RunningMean(0.75)
    resumed.load_state_dict(mean.state_dict())
    assert resumed.at(1, four)["w"].item() == 1.0
    assert resumed.at(2, four)["w"].item() == 1.75
    # In bfloat16, whose next number after 1 is 1.0078, a hundredth of that would be lost at each step.
    fine = RunningMean(0.99)
    fine.at(0, {"w": torch.tensor([1.0], dtype=torch.bfloat16)})
    means = [fine.at(step, {"w": torch.tensor([1.0078125], dtype=torch.bfloat16)}) for step in range(1, 200)]
    assert means[-1]["w"].item() == 1.0078125  # 1 + 0.0078 * (1 - 0.99^199), rounded


def rows_of(run: Path) -> list[dict[str, Any]]:
    # Versions count what a server was sent, so those of a resumed run are others.
    return [
        {k: v for k, v in row.items() if k not in TIMES | {"teacher_version"}}
        for row in read_rows(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("teacher", ["live", "ema"])
def test_a_resumed_run_has_the_same_teacher_bit_for_bit_whatever_the_server_has_now(
    model: Path, started: Any, tmp_path: Path, teacher: str
) -> None:
    """Resumed from step 4 at the server that has the last step's weights, and at one that was started anew."""
    stage = {"teacher": teacher, **({"ema_decay": DECAY} if teacher == "ema" else {})}
    server = started()
    unbroken = config_of(model, server.url("grpc"), tmp_path / "unbroken", **stage)
    last = train(unbroken, quiet=True)
    for name, url in (("same", server.url("grpc")), ("anew", started().url("grpc"))):
        resumed = config_of(model, url, tmp_path / name, **stage)
        shutil.copytree(tmp_path / "unbroken", tmp_path / name)
        config_file = tmp_path / name / "config.toml"
        config_file.write_text(config_file.read_text().replace(unbroken.run, resumed.run))
        checkpoint.remove(tmp_path / name / "checkpoints" / last.name)
        again = train(resumed, quiet=True)
        assert rows_of(tmp_path / name) == rows_of(tmp_path / "unbroken")
        ours, theirs = (load_file(path / "model.safetensors") for path in (again, last))
        assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
        if teacher == "ema":
            means = [torch.load(path / checkpoint.STAGE_FILE, weights_only=True)["mean"] for path in (again, last)]
            assert all(means[0][name].equal(tensor) for name, tensor in means[1].items())


@dataclass
class Disturbing(Sampler):
    """A sampler before whose first rollouts `disturb` is called; the inner one is the stage's."""

    inner: Any
    disturb: Any
    calls: list[int] = field(default_factory=list)

    def stream(
        self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]
    ) -> Iterator[dict[int, Rollout]]:
        if not self.calls:
            self.disturb()
        self.calls.append(len(problems))
        yield from self.inner.stream(problems, params, seeds=seeds)

    def close(self) -> None:
        self.inner.close()


def test_a_server_started_anew_between_weights_and_scores_is_sent_them_again(
    run: LoopThread, model: Path, started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_trainer.steady_teacher.IDENTITY_HOLDS_S", 0.0)
    ports = [int(server.url("http").rpartition(":")[2]) for server in (started(), started(), started())]
    proxy = run(ChaosProxy.start(ports[0], 0))
    url = f"http://127.0.0.1:{proxy.port}"
    try:
        with running(config_of(model, url, tmp_path / "disturbed", teacher="live")) as (learner, stage):
            learner.step(stage, stage.collect(0))
            opd = stage._opd
            assert isinstance(opd, Opd)

            def restart() -> None:
                run(proxy.move(ports[1]))

            opd._sampler = Disturbing(opd._sampler, restart)
            disturbed = stage.collect(1).batch.scored()
            assert opd._sampler.calls == [4, 4]  # written, scored in vain, and written again
    finally:
        run(proxy.stop())
    other = f"http://127.0.0.1:{ports[2]}"
    with running(config_of(model, other, tmp_path / "undisturbed", teacher="live")) as (learner, stage):
        learner.step(stage, stage.collect(0))
        undisturbed = stage.collect(1).batch.scored()
    assert disturbed.teacher_logp_BT is not None
    assert undisturbed.teacher_logp_BT is not None
    np.testing.assert_array_equal(disturbed.teacher_logp_BT, undisturbed.teacher_logp_BT)


class AnswersOnce(TransformersEngine):
    """An engine that is at all but the first item for ever, until they are given up or weights come."""

    num_asked = num_given_up = 0
    has_weights = False

    async def score(self, task: ScoreTask) -> ScoreRows:
        self.num_asked += 1
        if self.num_asked == 1 or self.has_weights:
            return await super().score(task)
        try:
            return await asyncio.Future()
        finally:
            self.num_given_up += 1

    async def load_weights(self, files: Sequence[Path]) -> None:
        self.has_weights = True
        await super().load_weights(files)


@dataclass
class InTurn(Sampler):
    """A sampler whose first text is asked for before the others, each in a request of its own; the inner is the
    stage's.
    """

    inner: Any
    engine: AnswersOnce

    def stream(
        self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]
    ) -> Iterator[dict[int, Rollout]]:
        for place, rollout in enumerate(self.inner.sample(problems, params, seeds=seeds)):
            yield {place: rollout}
            while not self.engine.num_asked:
                time.sleep(0.01)

    def close(self) -> None:
        self.inner.close()


def test_a_step_begun_anew_gives_up_its_first_attempt(
    run: LoopThread, model: Path, started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the server would finish first: it takes no weights while it scores by those of before."""
    monkeypatch.setattr("student_trainer.steady_teacher.IDENTITY_HOLDS_S", 3600.0)
    anew = AnswersOnce(str(model))
    ports = [int(server.url("http").rpartition(":")[2]) for server in (started(), started(anew))]
    proxy = run(ChaosProxy.start(ports[0], 0))
    tables = config_of(model, f"http://127.0.0.1:{proxy.port}", tmp_path / "run", teacher="live").model_dump()
    tables["teacher"] |= {"timeout_s": 60.0, "max_wait_s": 0.0}
    began = time.monotonic()
    try:
        with running(parse_config(tables)) as (_, stage):
            opd = stage._opd
            assert isinstance(opd, Opd)
            opd._sampler = Disturbing(InTurn(opd._sampler, anew), lambda: run(proxy.move(ports[1])))
            assert stage.collect(0).batch.scored().num_sequences == 4
    finally:
        run(proxy.stop())
    assert time.monotonic() - began < 30  # sooner than the server's patience ends
    # Of four texts one was answered; then four were.
    assert anew.num_given_up == anew.num_asked - 1 - 4


def test_two_runs_at_one_server_do_not_take_each_other_s_weights_for_theirs(model: Path, started: Any) -> None:
    """Both count from the version that they found, and the second one's number is that of the first one's weights."""
    url, weights = started().url("grpc"), load_file(model / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in weights.items()}
    with Scorer(url, temperature=1.0, timeout_s=60) as one, Scorer(url, temperature=1.0, timeout_s=60) as two:
        assert one.send_weights(weights) == 1
        with pytest.raises(Conflict, match="has had weights of version 1; version 1 is not above it"):
            two.send_weights(other)


def test_every_replica_of_a_pool_is_the_student_of_the_step(model: Path, started: Any, tmp_path: Path) -> None:
    urls = [started().url(scheme) for scheme in ("grpc", "http")]
    config = config_of(model, ",".join(urls), tmp_path / "run", teacher="live")
    with running(config) as (learner, stage):
        learner.step(stage, stage.collect(0))
        collected = stage.collect(1)
        student = said_by(learner.student.model, collected)
        for url in urls:
            logp_BTV, mask_BT, versions = told_nothing(url, collected)
            assert versions == {2}
            assert reverse_kl(student, logp_BTV)[mask_BT].abs().max() < 1e-6


def test_weights_that_somebody_else_has_sent_end_the_run(
    run: LoopThread, model: Path, started: Any, tmp_path: Path
) -> None:
    server = started()

    async def meddle() -> None:
        async with server.connect("grpc", token=SECRET) as other:
            await other.update_weights(WeightsUpdate("base", 50), read_chunks(model / "model.safetensors"))

    config = config_of(model, server.url("grpc"), tmp_path / "run", teacher="live")
    with running(config) as (_, stage):
        stage.collect(0)
        run(meddle())
        with pytest.raises(Conflict, match="has had weights of version 50; version 2 is not above it"):
            stage.collect(1)


@pytest.mark.parametrize(
    ("num_replicas", "sentence"),
    [
        (1, r'^teacher\.weights_by is "transfer" and teacher\.url grpc://.* takes none: .*--weights-transfer, or set '),
        (2, r'^teacher\.weights_by is "transfer" and teacher\.url grpc://.*,.* a pool, .*: name that server, or set '),
    ],
)
def test_who_takes_no_transfers_is_named_with_the_fix_before_the_first_step(
    model: Path, started: Any, tmp_path: Path, num_replicas: int, sentence: str
) -> None:
    url = ",".join(started().url("grpc") for _ in range(num_replicas))
    tables = config_of(model, url, tmp_path / "run", teacher="live").model_dump()
    tables["teacher"]["weights_by"] = "transfer"
    with pytest.raises(ConfigError, match=sentence), running(parse_config(tables)):
        pass
    tables["stage"]["teacher"] = "frozen"  # nothing is sent to it
    student = load_student(parse_config(tables).model)
    build_stage(parse_config(tables), student, build_task(parse_config(tables).task)).close()


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"ema_decay": 0.9}, 'ema_decay is of teacher = "ema" alone, and teacher is "frozen"'),
        ({"teacher": "ema", "ema_decay": 1.0}, "stage.opsd.ema_decay: Input should be less than 1"),
        ({"teacher": "love"}, "stage.opsd.teacher: Input should be 'frozen', 'live' or 'ema'"),
    ],
)
def test_a_wrong_teacher_is_named_with_its_fix(tables: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        config_of(Path("m"), "grpc://h:1", Path("r"), **tables)


def test_a_moving_teacher_scores_nothing_ahead() -> None:
    config = config_of(Path("m"), "grpc://h:1", Path("r"), teacher="live")
    tables = config.model_dump()
    tables["rollout"]["max_staleness"] = 1
    with pytest.raises(ConfigError, match=r'stage\.teacher is "live" and rollout\.max_staleness 1: .*to 0$'):
        parse_config(tables)
