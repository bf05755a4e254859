import dataclasses

import numpy as np
import pytest
import torch

from student_trainer import checkpoint
from student_trainer.collate import collate
from student_trainer.config import ModelConfig, parse_config
from student_trainer.learner import Learner
from student_trainer.loop import train
from student_trainer.run_folder import read_rows
from student_trainer.stages import Collected
from student_trainer.stages.sft import Sft
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import ToyTask, build_task

EOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def task():
    return build_task(ToyTask(train_size=100, held_out_size=20))


def config(tmp_path, model, **tables):
    return parse_config(
        {
            "run": str(tmp_path / "run"),
            "steps": 4,
            "problems_per_step": 6,
            "model": {"path": str(model)},
            "task": {"kind": "toy", "train_size": 100, "held_out_size": 20},
            "stage": {"kind": "sft"},
            "rollout": {"max_new_tokens": 8},
            "eval": {"num_problems": 20},
            "optim": {"lr": 1e-2},
        }
        | tables
    )


def test_the_sft_loss_is_the_mean_negative_log_likelihood_of_reference_and_eos(model, task):
    """Against a plain forward of each sequence alone."""
    student = load_student(ModelConfig(path=str(model)))
    stage = Sft(student, task.train, problems_per_step=3, seed=0)
    collected = stage.collect(0)
    total, num_tokens = 0.0, 0
    for row in range(3):
        prompt = collected.batch.prompt_ids_BN[row][collected.batch.prompt_mask_BN[row].bool()]
        completion = collected.batch.completion_ids_BT[row][collected.batch.mask_BT[row]]
        assert completion[-1] == EOS
        with torch.no_grad():
            logp = student.model(input_ids=torch.cat([prompt, completion])[None]).logits[0].log_softmax(-1)
        total -= float(logp[len(prompt) - 1 : -1].gather(-1, completion[:, None]).sum())
        num_tokens += len(completion)
    learner = Learner.build(student, config(model.parent, model))
    assert learner.step(stage, collected)["loss"] == pytest.approx(total / num_tokens, abs=1e-5)


def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(tmp_path, model, task):
    """Sequences of unlike lengths: a mean of micro-batch means would differ, a mean over the step's tokens does not."""
    weights = []
    for micro_batch_size in (6, 4, 1):
        student = load_student(ModelConfig(path=str(model)))
        settings = config(
            tmp_path, model, optim={"lr": 1e-2, "micro_batch_size": micro_batch_size, "max_grad_norm": 1e9}
        )
        learner = Learner.build(student, settings)
        stage = Sft(student, task.train, problems_per_step=6, seed=0)
        row = learner.step(stage, stage.collect(0))
        weights.append((row["loss"], row["grad_norm"], row["token_accuracy"]))
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-5)
    np.testing.assert_allclose(weights[2], weights[0], rtol=1e-5)


def test_training_lowers_the_loss_and_leaves_a_model_that_loads(tmp_path, model):
    last = train(config(tmp_path, model, steps=30), quiet=True)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(31))
    assert rows[-1]["loss"] < 0.75 * rows[1]["loss"]
    assert {"eval/accuracy", "eval/well_formed"} <= rows[0].keys() & rows[-1].keys()
    assert (
        load_student(ModelConfig(path=str(last))).fingerprint == load_student(ModelConfig(path=str(model))).fingerprint
    )


def test_a_finished_run_is_not_run_again(tmp_path, model):
    settings = config(tmp_path, model)
    last = train(settings, quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(settings, quiet=True) == last
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_only_the_newest_checkpoints_are_kept_and_a_partial_one_is_not_one(tmp_path, model):
    settings = config(tmp_path, model, steps=5, checkpoint={"every_steps": 2, "keep": 2})
    train(settings, quiet=True)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoint.found(folder)] == ["step-00000004", "step-00000005"]
    (folder / ".step-00000009.partial").mkdir()
    (folder / "step-9").mkdir()
    assert checkpoint.found(folder)[-1].name == "step-00000005"


@dataclasses.dataclass
class Poisoned:
    """A stage over one text whose loss is multiplied by `factor`."""

    factor: float

    def collect(self, step):
        return Collected(collate([np.array([1], np.int32)], [np.array([5, EOS], np.int32)]))

    def loss(self, logits_BTV, batch):
        return logits_BTV.sum(-1) * self.factor

    def watch(self, logits_BTV, batch):
        return {}

    def close(self):
        pass


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e38], ids=["nan loss", "inf loss", "inf gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_leaves_everything_as_it_was(tmp_path, model, factor):
    """Beside a learner that never took the step: the next good step takes both to the same weights."""
    good, poisoned = Poisoned(1.0), Poisoned(factor)
    states = []
    for stages in ([good, good], [good, poisoned, good]):
        learner = Learner.build(load_student(ModelConfig(path=str(model))), config(tmp_path, model))
        rows = [learner.step(stage, stage.collect(0)) for stage in stages]
        assert [row["skipped_steps"] for row in rows] == [int(stage is poisoned) for stage in stages]
        moments = [value for state in learner.optimizer.state.values() for value in state.values()]
        states.append([*learner.student.model.state_dict().values(), *moments, torch.tensor(rows[-1]["lr"])])
    assert all(left.equal(right) for left, right in zip(*states, strict=True))


def test_a_problem_without_a_reference_is_named(model, task):
    student = load_student(ModelConfig(path=str(model)))
    bare = [dataclasses.replace(task.train[0], reference=None)]
    with pytest.raises(ValueError, match=f"problem {task.train[0].id} has no reference"):
        Sft(student, bare, problems_per_step=1, seed=0)
