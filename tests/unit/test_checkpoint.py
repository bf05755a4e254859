import json
import time

import pytest
import torch

from student_trainer import checkpoint
from student_trainer.collate import completion_logits
from student_trainer.config import ModelConfig, parse_config
from student_trainer.export import export
from student_trainer.learner import Learner
from student_trainer.stages.sft import Sft
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import ToyTask, build_task
from teacher_server.adapters import check_adapter
from teacher_server.tensor_files import read_specs

LORA = {"rank": 4, "dropout": 0.3}
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": LORA},
    "bfloat16 lora, checkpointed": {"lora": LORA, "dtype": "bfloat16", "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def problems():
    return build_task(ToyTask(train_size=100, held_out_size=20)).train


def start(model, problems, **keys):
    config = parse_config(
        {
            "run": "unused",
            "steps": 5,
            "problems_per_step": 6,
            "model": {"path": str(model), **keys},
            "task": {"kind": "toy"},
            "stage": {"kind": "sft"},
            "optim": {"lr": 1e-2, "micro_batch_size": 4, "warmup_steps": 2},
        }
    )
    student = load_student(config.model)
    return Learner.build(student, config), Sft(student, problems, problems_per_step=6, seed=0)


def steps(learner, stage, which):
    return [learner.step(stage, stage.collect(step)) for step in which]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_run_takes_the_steps_of_the_unbroken_one_bit_for_bit(tmp_path, model, problems, kind):
    learner, stage = start(model, problems, **KINDS[kind])
    steps(learner, stage, (0, 1))
    learner.save(tmp_path, 2, keep=1)
    unbroken = steps(learner, stage, (2, 3))

    fresh, stage = start(model, problems, **KINDS[kind])
    assert fresh.restore(tmp_path / "step-00000002") == 2
    assert steps(fresh, stage, (2, 3)) == unbroken
    for name, weight in learner.weights.named.items():
        assert weight.dtype == torch.float32
        assert weight.equal(fresh.weights.named[name])
        for key, value in learner.optimizer.state[weight].items():
            assert value.equal(fresh.optimizer.state[fresh.weights.named[name]][key])
    names = learner.student.model.state_dict()
    assert all(tensor.equal(names[name]) for name, tensor in fresh.student.model.state_dict().items())
    assert {row["loss"] for row in unbroken}.isdisjoint({row["loss"] for row in steps(learner, stage, (2, 3))})


def test_an_adapter_alone_is_trained_and_saved_and_servers_take_it(tmp_path, model, problems):
    learner, stage = start(model, problems, lora={"rank": 4})
    before = {name: tensor.clone() for name, tensor in learner.student.model.state_dict().items()}
    steps(learner, stage, (0, 1, 2))
    changed = {name for name, tensor in learner.student.model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == learner.weights.named.keys()
    assert all(".lora_" in name for name in changed)
    learner.save(tmp_path, 3, keep=1)
    folder = tmp_path / "step-00000003"
    assert not (folder / "model.safetensors").exists()
    served = check_adapter(
        (folder / "adapter_config.json").read_text(),
        read_specs(folder / "adapter_model.safetensors"),
        read_specs(model / "model.safetensors"),
        max_rank=8,
    )
    assert json.loads(served)["r"] == 4
    # As a folder to evaluate or to train on, and exported: the adapted model's own logits.
    batch = stage.collect(0).batch
    plain = load_student(ModelConfig(path=str(model)))
    out = export(folder, tmp_path / "out")
    with torch.no_grad():
        expected = completion_logits(learner.student.model.eval(), batch)
        assert (completion_logits(plain.model.eval(), batch) - expected).abs().max() > 0.01
        for path in (folder, out):
            student = load_student(ModelConfig(path=str(path)))
            assert not student.is_adapted
            torch.testing.assert_close(completion_logits(student.model.eval(), batch), expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_number(model, problems):
    rows = []
    for keys in ({}, {"gradient_checkpointing": True}):
        learner, stage = start(model, problems, **keys)
        rows.append(steps(learner, stage, (0, 1)))
        assert learner.student.model.is_gradient_checkpointing == bool(keys)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["model.safetensors", "state/__0_0.distcp", "state/.metadata", "tokenizer.json"])
def test_a_damaged_file_is_named(tmp_path, model, problems, name):
    learner, _ = start(model, problems)
    folder = learner_saved(learner, tmp_path)
    file = folder / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=f"{name} has {len(whole)} bytes and CRC-32"):
        learner.restore(folder)
    file.write_bytes(whole[:middle])
    with pytest.raises(ValueError, match=f"{name} has {middle} bytes"):
        checkpoint.verify(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        checkpoint.verify(folder)
    file.write_bytes(whole)
    checkpoint.verify(folder)
    (folder / "trainer.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer\.json cannot be read"):
        learner.restore(folder)


def learner_saved(learner, folder):
    learner.save(folder, 1, keep=1)
    return folder / "step-00000001"


def test_a_checkpoint_of_another_model_is_refused(tmp_path, model, problems):
    learner, _ = start(model, problems)
    folder = learner_saved(learner, tmp_path / "one")
    wider = build_toy_model(tmp_path / "wider", hidden_size=64, num_layers=1)
    other, _ = start(wider, problems)
    with pytest.raises(ValueError, match="does not fit the model"):
        other.restore(folder)
    adapted, _ = start(model, problems, lora=LORA)
    with pytest.raises(ValueError, match="does not fit the model"):
        adapted.restore(folder)


def test_a_refused_write_leaves_the_checkpoints_as_they_were(tmp_path, model, problems):
    learner, _ = start(model, problems)
    folder = learner_saved(learner, tmp_path)
    (tmp_path / ".step-00000002.partial").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="partial"):
        learner.save(tmp_path, 2, keep=1)
    assert checkpoint.found(tmp_path) == [folder]
    checkpoint.verify(folder)


def test_export_leaves_the_trainers_files_out_and_overwrites_nothing(tmp_path, model, problems):
    learner, _ = start(model, problems)
    learner_saved(learner, tmp_path / "run" / "checkpoints")
    out = export(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {path.name for path in model.iterdir()} | {"generation_config.json"}
    with pytest.raises(ValueError, match="exists already"):
        export(tmp_path / "run", out)
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        export(model, tmp_path / "other")


def test_saving_a_tiny_model_is_quick(tmp_path, model, problems):
    """About 50 ms on an idle core; the fastest of five, so that a busy machine does not decide."""
    learner, stage = start(model, problems)
    steps(learner, stage, (0,))
    seconds = []
    for step in range(1, 6):
        started = time.perf_counter()
        learner.save(tmp_path, step, keep=1)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3
