"""What is trained, in which precision, and that a checkpoint gives all of it back."""

import json

import pytest
import torch
from safetensors.torch import load, load_file

from student_trainer import checkpoint
from student_trainer.collate import completion_logits
from student_trainer.config import ConfigError, ModelConfig, parse_config
from student_trainer.export import export
from student_trainer.learner import Learner
from student_trainer.stages.sft import Sft
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import ToyTask, build_task
from student_trainer.weights_sync import state_bytes
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
    """Every number of those steps but the clock's."""
    rows = [learner.step(stage, stage.collect(step)) for step in which]
    return [{name: value for name, value in row.items() if name != "watch_s"} for row in rows]


def logits_of(path, batch):
    with torch.no_grad():
        return completion_logits(load_student(ModelConfig(path=str(path))).model.eval(), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_run_takes_the_steps_of_the_unbroken_one_bit_for_bit(tmp_path, model, problems, kind):
    learner, stage = start(model, problems, **KINDS[kind])
    steps(learner, stage, (0, 1))
    learner.save(tmp_path, 2, stage, keep=1)
    unbroken = steps(learner, stage, (2, 3))

    fresh, stage = start(model, problems, **KINDS[kind])
    assert fresh.restore(tmp_path / "step-00000002") == 2
    assert steps(fresh, stage, (2, 3)) == unbroken
    for name, weight in learner.weights.named.items():
        assert weight.dtype == torch.float32
        assert weight.equal(fresh.weights.named[name])
        for key, value in learner.optimizer.state[weight].items():
            assert value.equal(fresh.optimizer.state[fresh.weights.named[name]][key])
    state = learner.student.model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in fresh.student.model.state_dict().items())
    # The same problems once more give other losses: the weights have moved since.
    assert {row["loss"] for row in unbroken}.isdisjoint({row["loss"] for row in steps(learner, stage, (2, 3))})


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16 lora, checkpointed"])
def test_others_load_a_checkpoint_in_the_dtype_that_the_student_computes_in(tmp_path, model, problems, kind):
    learner, stage = start(model, problems, **KINDS[kind])
    learner.save(tmp_path, 1, stage, keep=1)
    folder = tmp_path / "step-00000001"
    saved, initial = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert saved.keys() == initial.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(tensor.equal(initial[name].bfloat16()) for name, tensor in saved.items())  # B = 0 adds nothing


def test_an_adapter_alone_is_trained_and_everyone_else_sees_it_in_the_weights(tmp_path, model, problems):
    learner, stage = start(model, problems, lora={"rank": 4})
    before = {name: tensor.clone() for name, tensor in learner.student.model.state_dict().items()}
    steps(learner, stage, (0, 1, 2))
    changed = {name for name, tensor in learner.student.model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == learner.weights.named.keys()
    assert all(".lora_" in name for name in changed)
    learner.save(tmp_path, 3, stage, keep=1)
    folder = tmp_path / "step-00000003"
    batch = stage.collect(0).batch
    with torch.no_grad():
        expected = completion_logits(learner.student.model.eval(), batch)
    assert (logits_of(model, batch) - expected).abs().max() > 0.01
    for path in (folder, export(folder, tmp_path / "out")):
        torch.testing.assert_close(logits_of(path, batch), expected, atol=1e-5, rtol=0)
    pushed, saved = load(state_bytes(learner.student.model)), load_file(folder / "model.safetensors")
    assert pushed.keys() == saved.keys()
    assert all(tensor.equal(saved[name]) for name, tensor in pushed.items())


def test_a_checkpoint_holds_the_adapter_that_a_server_takes(tmp_path, model, problems):
    learner, stage = start(model, problems, lora={"rank": 4, "target_modules": ["q_proj", "v_proj"]})
    learner.save(tmp_path, 1, stage, keep=1)
    folder = tmp_path / "step-00000001" / "adapter"
    served = check_adapter(
        (folder / "adapter_config.json").read_text(),
        read_specs(folder / "adapter_model.safetensors"),
        read_specs(model / "model.safetensors"),
        max_rank=8,
    )
    assert json.loads(served)["r"] == 4
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 2  # A and B of two layers


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["embed_tokens"], r"names model\.embed_tokens, which takes no adapter"),
        (["q_proj", "lm_head"], "names lm_head, which takes no adapter"),
        (["nowhere"], "nowhere"),
    ],
)
def test_layers_that_take_no_adapter_are_refused(model, modules, said):
    with pytest.raises(ConfigError, match=said):
        load_student(ModelConfig(path=str(model), lora={"target_modules": modules}))  # pyright: ignore[reportArgumentType]


def test_gradient_checkpointing_changes_no_number(model, problems):
    rows = []
    for keys in ({}, {"gradient_checkpointing": True}):
        learner, stage = start(model, problems, **keys)
        rows.append(steps(learner, stage, (0, 1)))
        assert learner.student.model.is_gradient_checkpointing == bool(keys)
    assert rows[0] == rows[1]


def test_a_checkpoint_of_another_model_is_refused(tmp_path, model, problems):
    learner, stage = start(model, problems)
    learner.save(tmp_path / "one", 1, stage, keep=1)
    folder = tmp_path / "one" / "step-00000001"
    wider, _ = start(build_toy_model(tmp_path / "wider", hidden_size=64, num_layers=1), problems)
    adapted, _ = start(model, problems, lora=LORA)
    for other in (wider, adapted):
        with pytest.raises(ValueError, match="step-00000001 does not fit the model: "):
            other.restore(folder)


def test_export_leaves_out_what_is_the_trainers(tmp_path, model, problems):
    learner, stage = start(model, problems, lora={})
    learner.save(tmp_path / "checkpoints", 1, stage, keep=1)
    names = {path.name for path in export(tmp_path, tmp_path / "out").iterdir()}
    assert names == {path.name for path in model.iterdir()} | {"generation_config.json"}
    assert checkpoint.STATE_FOLDER not in names
