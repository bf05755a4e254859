"""Writes a commented config for a chosen stage. Every comment is a docstring of the config models; none stands here."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from student_trainer.config import ConfigError, StageConfig, TrainConfig
from student_trainer.config.parse import PLACEHOLDER

WIDTH = 100
"""Of a line of comment."""

SAMPLES = (1, 0.5, "x", [1], True, {})
"""One of these is valid for any required key: stands in for what a person fills in, to find out what else is needed."""

HEAD = (
    f'Written by `student-trainer init`. Replace every "{PLACEHOLDER}"; what is commented out with a bare # stands at '
    "its default."
)


def kinds() -> list[str]:
    """The stages that a config can be written for."""
    return [_kind(member) for member in _tables(StageConfig)]


def write_config(kind: str, task: str, out: Path) -> None:
    """Writes the config of stage `kind` on a task of kind `task` to `out`.

    Raises:
        ConfigError: there is no such kind, or `out` exists or cannot be written.
    """
    text = config_text(kind, task)
    try:
        with out.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out} exists and is not overwritten: choose another --out") from None
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}") from None


def config_text(kind: str, task: str) -> str:
    """The commented TOML; see `write_config`."""
    chosen = {"stage": kind, "task": task}
    for key, value in chosen.items():
        known = [_kind(member) for member in _tables_of(TrainConfig.model_fields[key])]
        if value not in known:
            raise ConfigError(f"{key} kind {value!r} does not exist: choose one of {', '.join(known)}")
    needed = _needed(chosen)
    lines = [*_comment(HEAD), "", *_table(TrainConfig, (), chosen, needed, mark="")]
    return "\n".join(lines) + "\n"


def _needed(chosen: Mapping[str, str]) -> frozenset[tuple[str, ...]]:
    """The optional keys that this stage cannot do without: a config that lacks one is refused with its name."""
    needed: frozenset[tuple[str, ...]] = frozenset()
    while True:
        try:
            TrainConfig.model_validate(_sample(TrainConfig, (), chosen, needed))
        except ValidationError as error:
            sentence = str(error)
            named = [path for path in _optional(TrainConfig, (), chosen) - needed if ".".join(path) in sentence]
            assert named, f"no optional key mends this: {sentence}"
            needed |= {max(named, key=len)}
        else:
            return needed


def _optional(model: type[BaseModel], path: tuple[str, ...], chosen: Mapping[str, str]) -> frozenset[tuple[str, ...]]:
    found: frozenset[tuple[str, ...]] = frozenset()
    for key, field in _fields(model):
        here = (*path, key)
        if _default(field) is None:
            found |= {here}
        elif member := _member(field, here, chosen):
            found |= _optional(member, here, chosen)
    return found


def _sample(
    model: type[BaseModel], path: tuple[str, ...], chosen: Mapping[str, str], needed: frozenset[tuple[str, ...]]
) -> dict[str, Any]:
    """The smallest config of `model`, with a sample for each value that must be given."""
    tables: dict[str, Any] = {}
    for key, field in _fields(model):
        here = (*path, key)
        if not (field.is_required() or here in needed or key == "kind"):
            continue
        if member := _member(field, here, chosen):
            tables[key] = _sample(member, here, chosen, needed)
        elif _choices(field):
            tables[key] = _choices(field)[0]
        else:
            tables[key] = next(sample for sample in SAMPLES if _is_valid(field, sample))
    return tables


def _table(
    model: type[BaseModel],
    path: tuple[str, ...],
    chosen: Mapping[str, str],
    needed: frozenset[tuple[str, ...]],
    *,
    mark: str,
) -> Iterator[str]:
    """The lines of one table, its own keys before its tables; `mark` is # where the whole table is commented out."""
    tables: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    for key, field in _fields(model):
        here = (*path, key)
        if member := _member(field, here, chosen):
            tables.append((key, field, member))
            continue
        yield from _comment(field.description)
        choices = _choices(field)
        if len(choices) > 1:
            yield from _comment(f"One of: {', '.join(map(str, choices))}.")
        default = _default(field)
        is_given = field.is_required() or here in needed or key == "kind"
        value = choices[0] if choices and field.is_required() else default
        shown = PLACEHOLDER if value is None or value is PydanticUndefined else value
        yield f"{mark if is_given else '#'}{key} = {_toml(shown)}"
    for key, field, member in tables:
        here = (*path, key)
        is_absent = _default(field) is None and here not in needed
        below = "#" if is_absent else mark
        yield ""
        yield from _comment(inspect.getdoc(member))
        yield from _comment(field.description)
        if others := [_kind(other) for other in _tables_of(field) if other is not member]:
            yield from _comment(f"Other kinds: {', '.join(others)}.")
        yield f"{below}[{'.'.join(here)}]"
        yield from _table(member, here, chosen, needed, mark=below)


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Each field by its key in the file."""
    for name, field in model.model_fields.items():
        yield field.alias or name, field


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True) if not field.default_factory else {}


def _member(field: FieldInfo, path: tuple[str, ...], chosen: Mapping[str, str]) -> type[BaseModel] | None:
    """The table that stands for this field: the chosen kind, the default's, or the first; None for a plain value."""
    members, default = _tables_of(field), _default(field)
    if isinstance(default, BaseModel):
        return type(default)
    if not members or not (field.is_required() or default is None):
        return None
    kind = chosen.get(path[-1]) if len(path) == 1 else None
    return next((member for member in members if _kind(member) == kind), members[0])


def _tables_of(field: FieldInfo) -> list[type[BaseModel]]:
    return _tables(field.annotation)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """The models in a union, whatever is wrapped around it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (tuple, list, dict, Literal):
        return []
    return [member for part in get_args(annotation) for member in _tables(part)]


def _kind(member: type[BaseModel]) -> str:
    field = member.model_fields.get("kind")
    return str(_choices(field)[0]) if field and _choices(field) else member.__name__


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    """The values of a literal; empty for any other type."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _is_valid(field: FieldInfo, sample: Any) -> bool:
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(sample)
    except ValidationError:
        return False
    return True


def _comment(text: str | None) -> list[str]:
    """The first paragraph of a docstring as lines of comment."""
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    return [f"# {line}" for line in textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False)]


def _toml(value: Any) -> str:
    """A value in TOML, on one line."""
    match to_jsonable_python(value, exclude_none=True, by_alias=True):
        case bool() as flag:
            return str(flag).lower()
        case str() as text:
            return json.dumps(text, ensure_ascii=False)
        case int() | float() as number:
            return repr(number)
        case Mapping() as table:
            return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in table.items()) + "}"
        case Sequence() as items:
            return "[" + ", ".join(map(_toml, items)) + "]"
        case other:
            raise AssertionError(f"{other!r} has no form in TOML")
