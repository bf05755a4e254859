"""A recipe: training runs in order, each of which may start from what an earlier one has left.

run = "runs/recipe"                     # stage NAME runs in runs/recipe/NAME
[task] ...                              # what stands outside the stages is every stage's
[[stages]]
name = "sft"
steps = 300
stage = { kind = "sft" }
[[stages]]
name = "opd"
model = { from = "sft" }                # the student starts as sft's last checkpoint
teacher = { url = "grpc://...", from = "rlvr" }    # that server is sent rlvr's last checkpoint first
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.config.base import ConfigError
from student_trainer.config.parse import STAGES, override_tables, parse_config, read_tables
from student_trainer.config.run import TrainConfig

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
Tables = dict[str, Any]


@dataclass(frozen=True)
class RecipeStage:
    """One run of a recipe.

    Attributes:
        name: unique within the recipe, and the name of its run folder.
        teacher_weights: the checkpoint folder that the teacher's server is sent before the run; None for nothing.
    """

    name: str
    config: TrainConfig
    teacher_weights: Path | None = None


def load_plan(path: Path, overrides: Sequence[str] = (), *, teacher: str | None = None) -> list[RecipeStage]:
    """The runs of a recipe, in order; a config of one run is a plan of one.

    Args:
        overrides: `key.path=value`; in a recipe `stages.NAME.key.path=value` is for one stage.
        teacher: the URL of every stage that has a teacher.

    Raises:
        ConfigError: something is wrong, in whichever stage; it is named, and nothing has run.
    """
    tables = read_tables(path)
    if STAGES not in tables:
        override_tables(tables, [*overrides, *([f"teacher.url={teacher}"] if teacher else [])])
        config = parse_config(tables)
        return [RecipeStage(config.stage.kind, config)]
    stages = _by_name(tables.pop(STAGES))
    of_stages = [override for override in overrides if override.startswith(f"{STAGES}.")]
    override_tables(tables, [override for override in overrides if override not in of_stages])
    names = list(stages)
    override_tables(stages, [override.removeprefix(f"{STAGES}.") for override in of_stages])
    if unknown := [name for name in stages if name not in names]:
        raise ConfigError(f"override of {STAGES}.{unknown[0]}: there is no such stage, only {', '.join(names)}")
    return parse_recipe(tables, stages, teacher=teacher)


def parse_recipe(shared: Tables, stages: dict[str, Tables], *, teacher: str | None = None) -> list[RecipeStage]:
    """The runs that these tables describe; see `load_plan`."""
    folder = shared.get("run")
    if not isinstance(folder, str):
        raise ConfigError("run: missing; it is the folder of all the recipe's runs")
    for key in ("model", "teacher"):
        if "from" in shared.get(key, {}):
            raise ConfigError(f"{key}.from: belongs in a stage, which says which earlier one it takes from")
    plan: list[RecipeStage] = []
    checkpoints: dict[str, Path] = {}
    for name, own in stages.items():
        try:
            stage = _stage(name, laid_over(shared, own), Path(folder) / name, checkpoints, teacher)
        except ConfigError as error:
            raise ConfigError("\n".join(f"stage {name}: {line}" for line in str(error).splitlines())) from None
        plan.append(stage)
        checkpoints[name] = last_checkpoint(stage.config)
    return plan


def last_checkpoint(config: TrainConfig) -> Path:
    """Where a run leaves its last checkpoint, from its first step on (`student_trainer.checkpoint`)."""
    return Path(config.run) / "checkpoints" / f"step-{config.steps:08d}"


def laid_over(shared: Tables, own: Tables) -> Tables:
    """`own` over `shared`, key by key; a table of another `kind` takes the other's place whole."""
    merged = deepcopy(shared)
    for key, value in own.items():
        under = merged.get(key)
        if isinstance(value, dict) and isinstance(under, dict) and value.get("kind") in (None, under.get("kind")):
            merged[key] = laid_over(under, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def _stage(name: str, tables: Tables, run: Path, checkpoints: dict[str, Path], teacher: str | None) -> RecipeStage:
    model, its_teacher = tables.get("model"), tables.get("teacher")
    if isinstance(model, dict) and "from" in model:
        model["path"] = str(_left_by(model.pop("from"), "model.from", checkpoints))
    weights: Path | None = None
    if isinstance(its_teacher, dict):
        if teacher:
            its_teacher["url"] = teacher
        if "from" in its_teacher:
            weights = _left_by(its_teacher.pop("from"), "teacher.from", checkpoints)
    return RecipeStage(name, parse_config(tables | {"run": str(run)}), weights)


def _left_by(source: object, key: str, checkpoints: dict[str, Path]) -> Path:
    if source not in checkpoints:
        earlier = ", ".join(checkpoints) or "none: it is the first"
        raise ConfigError(f"{key} is {source!r}; it must be an earlier stage ({earlier})")
    return checkpoints[str(source)]


def _by_name(stages: object) -> dict[str, Tables]:
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError("stages: must be tables, each under [[stages]]")
    named: dict[str, Tables] = {}
    for place, stage in enumerate(stages, start=1):
        name = stage.pop("name", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"stage {place}: name is {name!r}; it must be lower-case letters, digits, '-' or '_'")
        if name in named:
            raise ConfigError(f"stage {place}: name {name!r} is taken; its run folder would be another stage's")
        if "run" in stage:
            raise ConfigError(f"stage {name}: run: leave it out; a stage runs in the recipe's `run`, under its name")
        named[name] = stage
    return named
