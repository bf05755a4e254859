"""A teacher that goes away, comes back, stays away or comes back as another; real servers behind one address."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from student_trainer import checkpoint
from student_trainer.config import parse_config
from student_trainer.loop import train
from student_trainer.run_folder import read_rows
from student_trainer.steady_teacher import IDENTITY_HOLDS_S
from student_trainer.stopped import TeacherGone
from student_trainer.study.toy import SPECIAL_TOKENS, build_toy_model
from student_trainer.teacher_identity import TeacherMismatch
from tests.chaos_proxy import ChaosProxy, Faults
from tests.harness import LoopThread, Server, server_of
from tests.warm import last_step

pytestmark = pytest.mark.slow

STEPS = 6
TIMES = {"rollout_s", "score_s", "step_s", "watch_s", "scored_tokens_per_s", "teacher_wait_s"}
MONITORS = {
    *("reverse_kl", "overlap_ratio", "overlap_student_mass", "overlap_teacher_mass"),
    *("support_student_mass", "support_teacher_mass", "support_gap"),
    *("unnormalised_loss", "unnormalised_negative_share"),
    *("bias_norm", "pull_norm", "bias_ratio", "flipped_share", "flipped_score_share"),
    *("entropy", "teacher_entropy", "entropy_gap", "eos_probability"),
    *("hedge_frequency", "repeat_ratio", "zlib_ratio", "length_mean", "length_p95", "truncation_rate"),
    *("grad_norm", "reward", "skipped_steps"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("student", "teacher", "other")
    return {name: build_toy_model(folder / name, hidden_size=32, num_layers=1, seed=i) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def servers(run: LoopThread, models):
    """A server of each model."""
    with server_of(run, models["teacher"]) as teacher, server_of(run, models["other"]) as other:
        yield {"teacher": teacher, "other": other}


def port_of(server: Server) -> int:
    return int(server.url("http").rpartition(":")[2])


@pytest.fixture
def proxy(run: LoopThread, servers):
    """The one address of the teacher."""
    proxy = run(ChaosProxy.start(port_of(servers["teacher"]), 0))
    yield proxy
    run(proxy.stop())


def config(folder: Path, models, proxy: ChaosProxy, **teacher):
    return parse_config(
        {
            "run": str(folder),
            "steps": STEPS,
            "problems_per_step": 4,
            "model": {"path": str(models["student"])},
            "task": {"kind": "toy", "train_size": 50, "held_out_size": 10},
            "teacher": {"url": f"http://127.0.0.1:{proxy.port}"} | teacher,
            "stage": {"kind": "opd", "loss": {"top_k": 5}},
            "rollout": {"max_new_tokens": 8},
            "optim": {"lr": 1e-2},
            "eval": {"num_problems": 4},
            "checkpoint": {"every_steps": 100},
        }
    )


def after_step(folder: Path, step: int, what) -> threading.Thread:
    """Calls `what` in another thread as soon as the step is logged."""

    def watch() -> None:
        while last_step(folder) < step:
            time.sleep(0.002)
        what()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def rows_of(folder: Path):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "metrics.jsonl")]


def cut(proxy: ChaosProxy) -> None:
    proxy.faults = Faults(cut=1.0)


def test_training_waits_for_a_teacher_that_is_gone_and_says_for_how_long(tmp_path, models, proxy, caplog):
    away_s = 2.0

    def go_away_for_a_while() -> None:
        cut(proxy)
        time.sleep(away_s)
        proxy.faults = Faults()

    away = after_step(tmp_path / "run", 2, go_away_for_a_while)
    train(config(tmp_path / "run", models, proxy), quiet=True)
    away.join()
    train(config(tmp_path / "undisturbed", models, proxy), quiet=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")
    gone, back = [message for message in caplog.messages if "teacher" in message]
    url = f"teacher http://127.0.0.1:{proxy.port}"
    assert gone.startswith(f"{url} does not answer (NotReady: ")
    assert gone.endswith("waiting, 0 s so far, at most 3600 s")
    assert back.startswith(f"{url} is back after ")
    (waited,) = [
        row["teacher_wait_s"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "teacher_wait_s" in row
    ]
    # From the first failure, some milliseconds after the cut, to an answer: pauses of .5, 1 and 2 s.
    assert away_s - 0.5 < waited < away_s + 4


def test_a_teacher_that_stays_away_ends_the_run_which_can_go_on(tmp_path, models, proxy):
    away = after_step(tmp_path / "run", 2, lambda: cut(proxy))
    with pytest.raises(TeacherGone, match=r"has not answered for 1 s \(teacher.max_wait_s is 1; NotReady: ") as caught:
        train(config(tmp_path / "run", models, proxy, max_wait_s=1), quiet=True)
    away.join()
    assert caught.value.exit_code == 75
    num_done = rows_of(tmp_path / "run")[-1]["step"]
    assert num_done >= 2
    assert checkpoint.num_steps_of(checkpoint.found(tmp_path / "run" / "checkpoints")[-1]) == num_done
    proxy.faults = Faults()
    train(config(tmp_path / "run", models, proxy), quiet=True)
    train(config(tmp_path / "undisturbed", models, proxy), quiet=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")


def test_another_teacher_at_the_same_address_is_refused(run, tmp_path, models, servers, proxy):
    def swap() -> None:
        cut(proxy)
        run(proxy.move(port_of(servers["other"])))
        time.sleep(1.2 * IDENTITY_HOLDS_S)
        proxy.faults = Faults()

    swapped = after_step(tmp_path / "run", 2, swap)
    with pytest.raises(TeacherMismatch) as caught:
        train(config(tmp_path / "run", models, proxy), quiet=True)
    swapped.join()
    assert "has changed during the run: model was " in str(caught.value)
    num_done = rows_of(tmp_path / "run")[-1]["step"]
    # Nor is it taken when the run is started again; and the first one is, to the numbers of an undisturbed run.
    with pytest.raises(
        TeacherMismatch, match=r"is not the one that this run began with: model was .* or delete .*json"
    ):
        train(config(tmp_path / "run", models, proxy), quiet=True)
    assert rows_of(tmp_path / "run")[-1]["step"] == num_done
    run(proxy.move(port_of(servers["teacher"])))
    train(config(tmp_path / "run", models, proxy), quiet=True)
    train(config(tmp_path / "undisturbed", models, proxy), quiet=True)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "undisturbed")


def test_full_vocabulary_monitors_are_logged_when_due_and_agree_with_the_full_loss(tmp_path, models, proxy):
    """With all four rollouts: the exact reverse KL is the loss of a run that descends it."""
    settings = config(tmp_path / "run", models, proxy)
    watch = settings.watch.model_copy(update={"full_vocabulary_every": 3})
    loss = settings.stage.loss.model_copy(update={"kind": "reverse_kl"})  # pyright: ignore[reportAttributeAccessIssue]
    stage = settings.stage.model_copy(update={"loss": loss})
    train(settings.model_copy(update={"watch": watch, "stage": stage}), quiet=True)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "full/reverse_kl" in row] == [3, 6]
    for row in (rows[3], rows[6]):
        assert row["full/reverse_kl"] == pytest.approx(row["loss"], rel=1e-5)
        assert row["full/teacher_entropy"] == pytest.approx(row["teacher_entropy"], rel=1e-5)
        assert row["full/entropy_gap"] == pytest.approx(row["entropy_gap"], abs=1e-5)


def test_every_monitor_is_logged_at_every_step_and_rollouts_carry_the_teachers_advantage(tmp_path, models, proxy):
    train(config(tmp_path / "run", models, proxy), quiet=True)
    rows = rows_of(tmp_path / "run")[1:]
    deciles = {f"entropy_decile_{d}" for d in range(10)}
    assert all(row.keys() >= MONITORS | deciles for row in rows)
    rollouts = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 4 * STEPS
    assert all(len(r["tokens"]) == len(r["teacher_advantage"]) == r["num_tokens"] for r in rollouts)
    written = [[token for token in r["tokens"] if token not in SPECIAL_TOKENS] for r in rollouts]
    assert ["".join(tokens) for tokens in written] == [r["text"] for r in rollouts]
    # All four rollouts of a step are logged: minus the mean advantage is the estimate of the reverse KL.
    first = [nats for r in rollouts if r["step"] == 1 for nats in r["teacher_advantage"]]
    assert -sum(first) / len(first) == pytest.approx(rows[0]["reverse_kl"], abs=1e-4)
