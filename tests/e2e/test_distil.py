"""The trainer against a real teacher server, over real sockets: what a loss is when nothing, or one thing, is wrong."""

from pathlib import Path

import pytest
import torch

from protos.errors import NotReady
from student_trainer.collate import collate, completion_logits
from student_trainer.config import LossConfig, ModelConfig, parse_config
from student_trainer.loop import train
from student_trainer.losses import log_probs, reverse_kl, token_mean
from student_trainer.rollout.base import SamplingParams
from student_trainer.run_folder import read_rows
from student_trainer.scoring import Scorer, TeacherMismatch, Wanted
from student_trainer.seeds import rollout_seeds
from student_trainer.stages.objective import Objective
from student_trainer.stages.opd import collate_scored
from student_trainer.student import load_student
from student_trainer.study.measure import load_sampler, measure_closeness
from student_trainer.study.toy import VOCABULARY, build_toy_model
from student_trainer.tasks import ToyTask, build_task
from tests.harness import LoopThread, server_of
from tests.tiny_model import build_tiny_qwen3

pytestmark = pytest.mark.slow

V = len(VOCABULARY)
LOSSES = [
    *({"kind": "stop_gradient_reverse_kl", "support": s, "top_k": 5} for s in ("student", "teacher", "union")),
    {"kind": "reverse_kl"},
    {"kind": "forward_kl"},
]
loss_id = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss['kind']}-{loss.get('support', 'full')}")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: build_toy_model(folder / name, hidden_size=32, seed=i) for i, name in enumerate(("same", "other"))}


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def teacher(request, run: LoopThread, models):
    """A server of the model "same", which takes as many items a request as a server does by default."""
    with server_of(run, models["same"], request.param, max_items=1024) as server:
        yield server


def config(folder: Path, model: Path, url: str, **tables):
    return parse_config(
        {
            "run": str(folder / "run"),
            "steps": 2,
            "problems_per_step": 8,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
            "teacher": {"url": url},
            "stage": {"kind": "opd"},
            "rollout": {"max_new_tokens": 10},
            "optim": {"lr": 1e-9, "micro_batch_size": 3},
            "eval": {"num_problems": 10},
        }
        | tables
    )


@loss_id
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_teacher_equal_to_the_student_gives_zero_loss_and_zero_gradient(tmp_path, models, teacher, loss, temperature):
    """And another student, against the same teacher, does not."""
    figures = {}
    for name, model in models.items():
        settings = config(
            tmp_path / name,
            model,
            teacher.url("grpc"),
            stage={"kind": "opd", "loss": loss},
            rollout={"max_new_tokens": 10, "temperature": temperature},
        )
        (tmp_path / name).mkdir()
        train(settings, quiet=True)
        figures[name] = read_rows(tmp_path / name / "run" / "metrics.jsonl")[1]
    assert abs(figures["same"]["loss"]) < 1e-5
    assert figures["same"]["grad_norm"] < 1e-4
    assert abs(figures["same"]["reverse_kl"]) < 1e-5
    assert figures["same"]["overlap_ratio"] > 0.99
    assert abs(figures["other"]["loss"]) > 1e-3
    assert figures["other"]["grad_norm"] > 1e-2


def test_a_teacher_shifted_by_one_position_does_not_go_unseen(models, teacher):
    """Rows rolled by one: the zero of teacher = student is gone."""
    sampler = load_sampler(models["same"])
    objective = Objective(LossConfig(top_k=V), V, temperature=1.0)
    problems = build_task(ToyTask(train_size=50, held_out_size=10)).train[:8]
    rollouts = sampler.sample(problems, SamplingParams(max_new_tokens=10, top_ids=V), seeds=range(8))
    with Scorer(teacher.url("grpc"), temperature=1.0, timeout_s=60) as scorer:
        batch = collate_scored(rollouts, scorer.score(rollouts, objective.wanted))
    assert batch.teacher_logp_BT is not None
    assert batch.sampled_logp_BT is not None
    exact = (batch.teacher_logp_BT - batch.sampled_logp_BT)[batch.mask_BT].abs()
    shifted = (batch.teacher_logp_BT.roll(1, 1) - batch.sampled_logp_BT)[batch.mask_BT].abs()
    assert exact.max() < 1e-5
    assert shifted.nanmean() > 1e-2


def test_both_transports_give_the_same_run(tmp_path, models, teacher):
    rows = {}
    for transport in ("grpc", "http"):
        (tmp_path / transport).mkdir()
        train(config(tmp_path / transport, models["other"], teacher.url(transport), optim={"lr": 1e-3}), quiet=True)
        rows[transport] = read_rows(tmp_path / transport / "run" / "metrics.jsonl")
    for a, b in zip(rows["grpc"], rows["http"], strict=True):
        for name in ("loss", "reverse_kl", "grad_norm"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)


def test_more_rollouts_than_one_request_may_hold_are_scored_in_order(models, teacher):
    """The server takes 1024 items a request; each rollout's own log-probs tell whether it got its own scores."""
    problems = build_task(ToyTask(train_size=50, held_out_size=10)).train
    params = SamplingParams(max_new_tokens=2, num_samples=21)
    rollouts = load_sampler(models["same"]).sample(problems, params, seeds=range(50))
    with Scorer(teacher.url("grpc"), temperature=1.0, timeout_s=120) as scorer:
        assert len(rollouts) == 1050 > scorer.info.max_items
        results = scorer.score(rollouts, Wanted())
    for rollout, result in zip(rollouts, results, strict=True):
        assert result.sampled_logprobs == pytest.approx(rollout.logprobs, abs=1e-4)


def test_privileged_information_reaches_the_teacher_and_never_the_student(tmp_path, models, teacher):
    """Self-distillation with a rule: the teacher is the student, so all of the divergence is the rule's."""
    stage = {"kind": "opsd", "privileged": {"kind": "system", "text": "R"}}
    settings = config(tmp_path, models["same"], teacher.url("http"), stage=stage, rollouts_logged=8)
    train(settings, quiet=True)
    first = read_rows(tmp_path / "run" / "metrics.jsonl")[1]
    assert first["grad_norm"] > 1e-3
    rollouts = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 16
    assert all(message["role"] == "user" and "R" not in message["content"] for r in rollouts for message in r["prompt"])


def test_closeness_is_zero_to_itself_and_the_exact_divergence_to_another(models, teacher):
    """The sampled estimate lies within four standard errors of the full-vocabulary KL on the same rollouts."""
    problems = build_task(ToyTask(train_size=50, held_out_size=40)).held_out
    params = SamplingParams(max_new_tokens=10, top_ids=5)
    samplers = {name: load_sampler(model) for name, model in models.items()}
    with Scorer(teacher.url("grpc"), temperature=1.0, timeout_s=60) as scorer:
        same, other = (measure_closeness(s, scorer, problems, params, seed=0) for s in samplers.values())
    assert abs(same.reverse_kl) < 1e-5
    assert same.overlap_ratio > 0.99
    rollouts = samplers["other"].sample(problems, params, seeds=rollout_seeds(0, 0, 40))
    batch = collate([r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts])
    with torch.no_grad():
        logp = {name: log_probs(completion_logits(load(model), batch), 1.0) for name, model in models.items()}
    exact = float(token_mean(reverse_kl(logp["other"], logp["same"]), batch.mask_BT))
    assert other.num_tokens == batch.num_tokens
    assert other.standard_error > 0
    assert abs(other.reverse_kl - exact) < 4 * other.standard_error
    assert other.overlap_ratio < 0.9


def load(model: Path):
    return load_student(ModelConfig(path=str(model))).model.eval()


def test_a_teacher_that_does_not_fit_is_refused_with_every_difference(tmp_path, models, teacher):
    tiny = build_tiny_qwen3(tmp_path / "tiny")
    stage = {"kind": "opd", "loss": {"kind": "reverse_kl"}}
    settings = config(tmp_path, tiny, teacher.url("grpc"), stage=stage, rollout={"max_new_tokens": 1000})
    with pytest.raises(TeacherMismatch) as caught:
        train(settings, quiet=True)
    message = str(caught.value)
    assert teacher.url("grpc") in message
    assert f"the student's output has 304 rows, the teacher's {V}" in message
    assert "their vocabularies map tokens to different ids" in message
    assert "their chat templates differ" in message
    assert "the teacher takes at most 512" in message


def test_a_teacher_that_is_not_there_is_named(tmp_path, models):
    with pytest.raises(NotReady, match=r"127\.0\.0\.1:9"):
        train(config(tmp_path, models["same"], "grpc://127.0.0.1:9"), quiet=True)


def test_what_a_loss_asks_for_is_what_it_needs():
    full = Objective(LossConfig(kind="reverse_kl"), V, temperature=1.0)
    top = Objective(LossConfig(top_k=5), V, temperature=1.0)
    assert full.wanted == Wanted(teacher_top_k=full.top_k, vocab_size=V, temperature=1.0, entropy=True)
    assert top.wanted == Wanted(teacher_top_k=5, student_top_k=5, temperature=1.0, entropy=True)
