"""Two processes under torchrun (gloo, FSDP2) take the steps of one, and either goes on from the other's checkpoint.

The servers run the transformers engine: its numbers do not depend on what is scored beside an item.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer import checkpoint
from student_trainer.config import ConfigError, TrainConfig, dump_config, load_config, parse_config
from student_trainer.config.recipe import load_plan
from student_trainer.learner import Learner
from student_trainer.loop import train
from student_trainer.manifest import damage
from student_trainer.recipe import run_plan
from student_trainer.run_folder import read_rows
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model, toy_tokenizer
from tests.harness import LoopThread, served
from tests.taking_weights import SECRET, taking_weights
from tests.toy_run import toy_run, write_toy_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 6
HALF = 3
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")

TABLES = {
    "steps": STEPS,
    "problems_per_step": 7,
    "seed": 5,
    "task": {"kind": "toy", "train_size": 200, "held_out_size": 20},
    "rollout": {"max_new_tokens": 8},
    "optim": {"lr": 1e-2, "micro_batch_size": 3, "warmup_steps": 2},
    "eval": {"num_problems": 9, "every_steps": HALF, "batch_size": 3},
    "checkpoint": {"every_steps": HALF, "keep": 5},
}
"""Seven problems over two ranks are shares of 3 and 4, and at three a micro-batch one rank has one more."""

FOUR_IN_FULL = {"full_vocabulary_every": 1, "full_vocabulary_rollouts": 4}
"""The whole share of rank 0, and one of rank 1's."""

SMALL_SUMS = {
    "kind": "toy",
    "min_terms": 2,
    "max_terms": 2,
    "max_operand": 4,
    "train_size": 10,
    "held_out_size": 2,
    "rules": ["terse"],
    "rule_rate": 1.0,
}
"""Some of which a recipe's first stage learns to answer: an untrained model's rewards are all 0."""

TOLD = {"kind": "opsd", "privileged": {"kind": "user_suffix", "text": "{answer}"}}

RECIPE = {
    "warm": {"steps": 20, "stage": {"kind": "sft"}, "optim": {"lr": 1e-2}},
    "grpo": {"stage": {"kind": "grpo", "num_minibatches": 2, "kl_coefficient": 0.05, "truncated": "punish"}},
    "ppo": {"stage": {"kind": "ppo", "num_minibatches": 3, "num_epochs": 2, "kl_coefficient": 0.05, "critic_lr": 1e-3}},
    "frozen": {"stage": TOLD, "teacher": {"from": "warm"}},
    "live": {"stage": TOLD | {"teacher": "live"}},
    "ema": {"stage": TOLD | {"teacher": "ema", "ema_decay": 0.5}},
    "remote": {"stage": {"kind": "opd"}},
}
"""Every stage, from what the first one leaves."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_toy_model(tmp_path_factory.mktemp("student"), hidden_size=32, num_layers=2)


@pytest.fixture(scope="module")
def untied(model: Path, tmp_path_factory) -> Path:
    """A model whose LM head has a weight of its own, which ranks with fewer micro-batches must reduce with the rest."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student_url(run: LoopThread, untied: Path, tmp_path_factory):
    """Of a server of the student's model, which takes weights."""
    context = taking_weights(untied, tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patch, run.entered(context) as server:
        patch.setenv("TEACHER_TOKEN", SECRET)
        yield server.url("grpc")


@pytest.fixture(scope="module")
def teacher_url(run: LoopThread, tmp_path_factory):
    model = build_toy_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, num_layers=1, seed=1)
    with served(run, model) as url:
        yield url


def write_config(folder: Path, model_path: Path, **changes) -> Path:
    return write_toy_run(folder, model_path, **TABLES | changes)


def write_recipe(folder: Path, model: Path, teacher_url: str, student_url: str) -> Path:
    """All stages of RECIPE; the server of `student_url` takes weights."""
    stages = {name: {"name": name, "model": {"from": "warm"}} | own for name, own in RECIPE.items()}
    stages["warm"]["model"] = {"path": str(model)}
    for name in ("frozen", "live", "ema"):
        stages[name]["teacher"] = {**stages[name].get("teacher", {}), "url": student_url}
    for name in ("grpo", "ppo", "remote"):
        stages[name]["rollout"] = {"samples_per_problem": 3}
    stages["remote"]["rollout"] |= {"url": student_url, "max_staleness": 1}
    stages["remote"]["teacher"] = {"url": teacher_url}
    tables = TABLES | {"run": str(folder), "task": SMALL_SUMS, "eval": {"num_problems": 2}}
    tables["optim"] = TABLES["optim"] | {"lr": 1e-3}
    folder.mkdir()
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(tables | {"stages": list(stages.values())}))
    return path


def continued(other: TrainConfig, folder: Path) -> Path:
    """The config of `other`'s run in `folder`, where it stands after HALF steps."""
    config = other.model_copy(update={"run": str(folder / "run")})
    source, target = Path(other.run), Path(config.run)
    name = f"step-{HALF:08d}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[: HALF + 1]))
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    return path


def under_torchrun(*configs: Path) -> None:
    script = Path(__file__).with_name("ranks.py")
    result = subprocess.run([*TORCHRUN, script, *configs], capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def curve(config: TrainConfig, name: str = "loss") -> list[float]:
    rows = read_rows(Path(config.run) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(config.steps + 1))
    return [row[name] for row in rows[1:]]


def saved(config: TrainConfig) -> dict:
    return load_file(checkpoint.found(Path(config.run) / "checkpoints")[-1] / "model.safetensors")


Runs = dict[str, TrainConfig]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model: Path, untied: Path, teacher_url: str, student_url: str) -> tuple[Runs, Runs, Runs]:
    """Runs by name: of one process, of two, and those that went on with the other number. One start of torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    adapted = {"path": str(model), "lora": {"rank": 4}, "gradient_checkpointing": True}
    half = {"model": {"path": str(untied), "dtype": "bfloat16"}, "checkpoint": {"every_steps": 1, "keep": STEPS}}
    tables = {
        "sft": {},
        "opd": {"stage": {"kind": "opd"}, "teacher": {"url": teacher_url}, "watch": FOUR_IN_FULL},
        "lora": {"model": adapted},
        "bf16": half,
    }
    files, recipes = (
        [
            [write_config(folder / f"{name}-{ranks}", model, **changes) for name, changes in tables.items()]
            for ranks in (1, 2)
        ],
        [write_recipe(folder / f"recipe-{ranks}", untied, teacher_url, student_url) for ranks in (1, 2)],
    )
    one, two = (
        {name: load_config(file) for name, file in zip(tables, files[ranks], strict=True)}
        | {stage.name: stage.config for stage in load_plan(recipes[ranks])}
        for ranks in (0, 1)
    )
    for file in (*files[0], recipes[0]):
        for _ in run_plan(load_plan(file), quiet=True):
            pass
    by_two = {name: continued(one[name], folder / f"{name}-1-2") for name in ("sft", "ppo")}
    under_torchrun(*files[1], recipes[1], *by_two.values())
    by_one = {name: continued(two[name], folder / f"{name}-2-1") for name in ("opd", "ppo", "ema")}
    for file in by_one.values():
        train(load_config(file), quiet=True)
    moved = {f"{name} by two": load_config(file) for name, file in by_two.items()}
    return one, two, moved | {f"{name} by one": load_config(file) for name, file in by_one.items()}


@pytest.mark.parametrize("name", ["sft", "opd", "lora", *RECIPE])
def test_two_processes_take_the_steps_of_one(runs, name):
    one, two = runs[0][name], runs[1][name]
    assert curve(two) == pytest.approx(curve(one), abs=1e-4)
    assert max(curve(one)) - min(curve(one)) > 30e-4  # the runs went 30 tolerances far
    assert saved(two).keys() == saved(one).keys()
    for signal in SIGNALS.get(name, ()):
        assert curve(two, signal) == pytest.approx(curve(one, signal), abs=1e-4)
    # The gradient follows the weights: over a whole step its norm changes by as much as itself.
    norms, others = curve(one, "grad_norm"), curve(two, "grad_norm")
    assert others == pytest.approx(norms, rel=ROUNDING + steps_apart(one, two))
    if one.model.path == two.model.path:
        assert others[0] == pytest.approx(norms[0], rel=ROUNDING)


ROUNDING = 1e-6
"""Of a norm in float32, relatively: 16 units of 2^-24."""


def steps_apart(one: TrainConfig, two: TrainConfig) -> float:
    """The longest way between two runs' weights, at the steps of their checkpoints, in lengths of one step."""
    ours, theirs = (
        {checkpoint.num_steps_of(path): vector(path) for path in checkpoint.found(Path(config.run) / "checkpoints")}
        for config in (one, two)
    )
    first, last = min(ours), max(ours)
    step = (ours[last] - ours[first]).norm() / (last - first)
    return max(float((ours[at] - theirs[at]).norm() / step) for at in ours)


def vector(path: Path) -> torch.Tensor:
    """A checkpoint's weights, end to end."""
    return torch.cat([weight.double().flatten() for _, weight in sorted(load_file(path / "model.safetensors").items())])


WRITTEN = ("reward", "length_mean", "length_p95", "truncation_rate", "repeat_ratio", "zlib_ratio")

DECILES = tuple(f"entropy_decile_{d}" for d in range(10))

SIGNALS = {
    "opd": (*WRITTEN, *DECILES, "reverse_kl", "full/reverse_kl", "num_tokens"),
    "grpo": (*WRITTEN, "groups_dropped", "draws", "sampled_tokens", "num_updates", "num_tokens", "reference_kl"),
    "ppo": ("reward", "sampled_tokens", "num_updates", "num_tokens", "value_loss", "value_mean"),
    "remote": (*WRITTEN, *DECILES, "staleness", "num_tokens"),
}
"""What is logged alike, beside the loss and the gradient's norm."""


def test_grpo_draws_further_problems_and_learns_from_them(runs):
    """Some of the step's seven groups are all equal, and an odd number is drawn in their place."""
    grpo = runs[1]["grpo"]
    assert max(curve(grpo, "draws")) > 1
    assert max(curve(grpo, "num_updates")) == 2


@pytest.mark.parametrize("name", ["sft by two", "ppo by two", "opd by one", "ppo by one", "ema by one"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    one, two, moved = runs
    source = (one if name.endswith("by two") else two)[name.split()[0]]
    assert curve(moved[name], "grad_norm")[HALF] == pytest.approx(curve(source, "grad_norm")[HALF], rel=ROUNDING)
    assert curve(moved[name]) == pytest.approx(curve(one[name.split()[0]]), abs=1e-4)
    if name.startswith("ppo"):
        assert curve(moved[name], "value_loss") == pytest.approx(curve(one["ppo"], "value_loss"), abs=1e-4)


def test_in_bfloat16_two_processes_have_the_masters_of_one(runs):
    """Three micro-batches, the same ones whoever has them, give the same bfloat16 gradients; their sum in float32, of
    8 bits each in 24, is exact while their exponents are within 16. So step 1 has one loss, and one gradient up to the
    rounding of its norm, of which AdamW's first step lr g / (|g| + 1e-8) is free: the masters are equal to float32's
    rounding, 2^-24 of weights below 1, a few times; 1e-6 is 16 such.
    """
    one, two = runs[0]["bf16"], runs[1]["bf16"]
    assert curve(two)[0] == pytest.approx(curve(one)[0], abs=1e-12)
    assert curve(two, "grad_norm")[0] == pytest.approx(curve(one, "grad_norm")[0], rel=1e-6)
    masters, others = (masters_after_a_step(config) for config in (one, two))
    start = load_file(Path(one.model.path) / "model.safetensors")
    for name, master in masters.items():
        torch.testing.assert_close(others[name], master, rtol=0, atol=1e-6)
        assert (master - start[name]).abs().max() > 1e-3  # lr / warmup_steps = 5e-3 is the step
    assert {str(tensor.dtype) for tensor in saved(two).values()} == {"torch.bfloat16"}


def masters_after_a_step(config: TrainConfig) -> dict[str, torch.Tensor]:
    learner = Learner.build(load_student(config.model), config)
    learner.restore(Path(config.run) / "checkpoints" / "step-00000001")
    return {name: weight.detach() for name, weight in learner.weights.named.items()}


def test_a_rank_that_is_killed_ends_the_run_and_its_checkpoints_are_whole(tmp_path, model):
    config = write_config(tmp_path / "killed", model, steps=100_000, checkpoint={"every_steps": 5})
    run = tmp_path / "killed" / "run"
    command = [*TORCHRUN, "-m", "student_trainer", "train", str(config)]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not checkpoint.found(run / "checkpoints"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        children[1].kill()
        assert process.wait(timeout=60) != 0
    assert not any(child.is_running() for child in children)
    assert all(damage(path) == "" for path in checkpoint.found(run / "checkpoints"))


def test_fewer_problems_than_processes_are_refused(tmp_path, model):
    config = parse_config(toy_run(tmp_path, model, **TABLES))
    config.check_ranks(7)
    with pytest.raises(ConfigError, match="problems_per_step is 7, fewer than the 8 processes: raise it, or start"):
        config.check_ranks(8)
