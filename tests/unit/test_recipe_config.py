"""Recipes: what a file says of each stage, and what is refused before anything has run."""

from pathlib import Path

import pytest

from student_trainer.config import ConfigError, load_config
from student_trainer.config.recipe import load_plan

RECIPE = """
run = "runs/r"
steps = 5
[task]
kind = "toy"
train_size = 70
[optim]
lr = 1e-3
warmup_steps = 3
[[stages]]
name = "first"
model = { path = "m" }
stage = { kind = "sft" }
[[stages]]
name = "second"
steps = 7
model = { from = "first" }
stage = { kind = "sft" }
optim = { lr = 1e-4 }
task = { kind = "jsonl", path = "p.jsonl" }
[[stages]]
name = "third"
model = { from = "first", dtype = "bfloat16" }
teacher = { url = "grpc://h:1", name = "rlvr", from = "second" }
stage = { kind = "opd" }
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def changed(recipe: Path, old: str, new: str) -> Path:
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new, 1))
    return recipe


def test_stages_take_what_is_shared_and_what_earlier_ones_left(recipe):
    first, second, third = load_plan(recipe)
    assert [stage.name for stage in (first, second, third)] == ["first", "second", "third"]
    assert [stage.config.run for stage in (first, second, third)] == [
        f"runs/r/{n}" for n in ("first", "second", "third")
    ]
    assert [stage.config.steps for stage in (first, second, third)] == [5, 7, 5]
    # A table is laid over the shared one key by key; a task of another kind takes its place whole.
    assert (second.config.optim.lr, second.config.optim.warmup_steps) == (1e-4, 3)
    assert (first.config.task.kind, second.config.task.kind) == ("toy", "jsonl")
    assert second.config.model.path == third.config.model.path == "runs/r/first/checkpoints/step-00000005"
    assert third.config.model.dtype == "bfloat16"
    assert third.teacher_weights == Path("runs/r/second/checkpoints/step-00000007")
    assert third.config.teacher is not None
    assert third.config.teacher.name == "rlvr"
    assert first.teacher_weights is second.teacher_weights is None


def test_overrides_are_for_all_stages_or_for_one(recipe):
    plan = load_plan(recipe, ["seed=4", "stages.second.optim.lr=2e-4"], teacher="http://other:2")
    assert [stage.config.seed for stage in plan] == [4, 4, 4]
    assert [stage.config.optim.lr for stage in plan] == [1e-3, 2e-4, 1e-3]
    teacher = plan[2].config.teacher
    assert teacher is not None
    assert teacher.url == "http://other:2"
    assert plan[0].config.teacher is None
    with pytest.raises(ConfigError, match=r"override of stages\.forth: there is no such stage, only first, second"):
        load_plan(recipe, ["stages.forth.steps=1"])


def test_a_config_of_one_run_is_a_plan_of_one(recipe):
    path = changed(
        recipe, RECIPE, 'run = "r"\nsteps = 1\nmodel = {path = "m"}\ntask = {kind = "toy"}\nstage = {kind = "sft"}'
    )
    [stage] = load_plan(path, ["steps=3"])
    assert stage.config == load_config(path, ["steps=3"])
    assert stage.config.run == "r"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("lr = 1e-4", "lrr = 1", "stage second: optim.lrr: unknown key; did you mean 'lr'?"),
        (
            'from = "second"',
            'from = "third"',
            "stage third: teacher.from is 'third'; it must be an earlier stage (first, second)",
        ),
        (
            'path = "m"',
            'from = "x"',
            "stage first: model.from is 'x'; it must be an earlier stage (none: it is the first)",
        ),
        ('name = "second"', 'name = "first"', "stage 2: name 'first' is taken"),
        ('name = "second"', 'name = "../x"', "stage 2: name is '../x'; it must be lower-case letters"),
        ("steps = 7", 'run = "y"', "stage second: run: leave it out"),
        ('run = "runs/r"\n', "", "run: missing; it is the folder of all the recipe's runs"),
        ("[optim]", '[model]\nfrom = "first"\n[optim]', "model.from: belongs in a stage"),
        (
            'teacher = { url = "grpc://h:1", name = "rlvr", from = "second" }',
            "",
            "stage third: stage opd needs a teacher",
        ),
    ],
)
def test_a_mistake_names_its_stage(recipe, old, new, sentence):
    with pytest.raises(ConfigError) as caught:
        load_plan(changed(recipe, old, new))
    assert sentence in str(caught.value)


def test_a_recipe_where_one_run_is_wanted_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"recipe\.toml is a recipe of several runs; give the config\.toml of one"):
        load_config(recipe)


def test_the_shipped_recipes_are_valid():
    configs = Path(__file__).parents[2] / "student_trainer" / "configs"
    warmup, told = load_plan(configs / "recipe.toml")
    assert (warmup.config.stage.kind, told.config.stage.kind) == ("sft", "opsd")
    assert Path(told.config.model.path) == told.teacher_weights == Path("runs/recipe/warmup/checkpoints/step-00000300")
    sft, rlvr, opd = load_plan(configs / "recipe_rlvr.toml")
    assert [stage.config.stage.kind for stage in (sft, rlvr, opd)] == ["sft", "grpo", "opd"]
    assert Path(opd.config.model.path) == Path("runs/recipe_rlvr/sft/checkpoints/step-00000300")
    assert opd.teacher_weights == Path("runs/recipe_rlvr/rlvr/checkpoints/step-00000200")
    assert opd.config.teacher is not None
    assert opd.config.teacher.url == rlvr.config.rollout.url
    assert (rlvr.config.num_samples, opd.config.num_samples) == (8, 1)
