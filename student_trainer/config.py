"""What a run is: the TOML config, its defaults and its checks. Pydantic only; nothing heavy is imported here."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from student_trainer.tasks.config import TaskConfig


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and the fix."""


class Section(BaseModel):
    """One table of the config: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The student."""

    path: str
    """A folder in transformers' format, or a Hub id."""
    revision: str | None = None
    """A Hub revision; None is the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""
    device: str = "auto"
    """"auto" takes CUDA where there is one."""


class SystemPrivileged(Section):
    """Privileged information: a system message."""

    kind: Literal["system"]
    text: str
    """The message, the same for every problem: a shared rule."""


class ReferencePrivileged(Section):
    """Privileged information: each problem's own reference solution."""

    kind: Literal["reference"]
    template: str = "solution"
    """One of the server's templates (see `TeacherInfo.reference_templates`)."""


class AnswerPrivileged(Section):
    """Privileged information: each problem's own answer, after the user's text."""

    kind: Literal["answer"]
    template: str = "answer"
    """One of the server's templates."""


PrivilegedConfig = Annotated[SystemPrivileged | ReferencePrivileged | AnswerPrivileged, Field(discriminator="kind")]


class TeacherConfig(Section):
    """Who scores."""

    url: str
    """grpc://HOST:PORT or http://HOST:PORT; grpcs and https for TLS. Its token, which no file of the run may hold, is
    taken from the environment variable TEACHER_TOKEN."""
    ca: str | None = None
    """The certificate authority of a grpcs or https teacher, a PEM file; None is TEACHER_CA's, or else the system's."""
    timeout_s: PositiveFloat = 300.0
    """For scoring one step's rollouts."""


class LossConfig(Section):
    """What is descended."""

    kind: Literal["stop_gradient_reverse_kl", "reverse_kl", "forward_kl"] = "stop_gradient_reverse_kl"
    """`reverse_kl` and `forward_kl` ask the teacher for its whole vocabulary: for small vocabularies."""
    support: Literal["student", "teacher", "union"] = "student"
    """Whose most likely ids a truncated loss runs over; full-vocabulary losses ignore it."""
    top_k: PositiveInt = 20
    """K of the support; a vocabulary smaller than K is taken whole."""


class SftStage(Section):
    """Supervised fine-tuning on the problems' references."""

    kind: Literal["sft"]


class OpdStage(Section):
    """On-policy distillation from a teacher."""

    kind: Literal["opd"]
    loss: LossConfig = LossConfig()
    privileged: PrivilegedConfig | None = None
    """What the teacher sees and the student does not; optional in OPD."""


class OpsdStage(Section):
    """On-policy self-distillation: the teacher is the student's own earlier weights, told more."""

    kind: Literal["opsd"]
    privileged: PrivilegedConfig
    """What the teacher sees and the student does not; without it teacher and student would be equal."""
    loss: LossConfig = LossConfig()


StageConfig = Annotated[SftStage | OpdStage | OpsdStage, Field(discriminator="kind")]


class RolloutConfig(Section):
    """How the student writes."""

    samples_per_problem: PositiveInt = 1
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    """Of rollouts and of both models' log-probs in the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 the rollouts leave the student's own distribution and the loss is no longer exactly on-policy."""


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the rate rises from 0 to `lr`: the first steps of AdamW are its largest."""
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The rate at the last step, as a share of `lr`."""
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_size: PositiveInt = 64
    """Sequences in one forward pass; gradients accumulate to the whole step's token mean."""


class EvalConfig(Section):
    """Greedy accuracy on held-out problems."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """0 evaluates at the end only."""
    num_problems: PositiveInt = 500
    max_new_tokens: PositiveInt | None = None
    """None takes the rollouts' own budget."""
    batch_size: PositiveInt = 128


class CheckpointConfig(Section):
    """What is kept on disk."""

    every_steps: PositiveInt = 100
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""


class TrainConfig(Section):
    """One training run."""

    run: str
    """The run folder; a run that finds its own config there goes on from its last checkpoint."""
    steps: PositiveInt
    """Optimiser steps."""
    problems_per_step: PositiveInt = 64
    """Problems behind one optimiser step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the problems' order and of every sample; equal configs and seeds give equal runs."""
    model: ModelConfig
    task: TaskConfig
    stage: StageConfig
    teacher: TeacherConfig | None = None
    """Needed by opd and opsd; `--teacher URL` sets its url."""
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    rollouts_logged: Annotated[int, Field(ge=0)] = 4
    """Rollouts written to rollouts.jsonl at each step, for people to read."""

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> Self:
        if self.stage.kind != "sft" and self.teacher is None:
            raise ValueError(f"stage {self.stage.kind} needs a teacher: set teacher.url or pass --teacher URL")
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in a TOML file, with `key.path=value` overrides (values in TOML; bare words are strings).

    Raises:
        ConfigError: the file, an override or the result is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _override(tables, override)
    return parse_config(tables)


def parse_config(tables: dict[str, Any]) -> TrainConfig:
    """The config in plain tables.

    Raises:
        ConfigError: a key is unknown, missing or has a wrong value; every fault is listed.
    """
    try:
        return TrainConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(fault) for fault in error.errors())) from None


def dump_config(config: TrainConfig) -> str:
    """The resolved config as TOML; None is left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _override(tables: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r} is not KEY=VALUE, for example optim.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.split(".")
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a table")
    table[leaf] = value


def _sentence(fault: Any) -> str:
    """One fault of pydantic's as a sentence that names the key, the value and the fix."""
    key = ".".join(str(part) for part in fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            known = _known_keys(fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
        case _:
            return f"{key}: {fault['msg']} (got {fault['input']!r})"


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at `loc`, found in the JSON schema; a union's location names the member's tag."""
    root = TrainConfig.model_json_schema()
    node: dict[str, Any] = root

    def resolve(schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    for part in loc:
        node = resolve(node)
        if part in node.get("properties", {}):
            node = node["properties"][part]
            node = next((option for option in node.get("anyOf", []) if option.get("type") != "null"), node)
        elif mapping := node.get("discriminator", {}).get("mapping"):
            node = {"$ref": mapping[part]} if part in mapping else {}
    return list(resolve(node).get("properties", {}))
