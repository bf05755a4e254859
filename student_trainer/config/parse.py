"""From a TOML file and overrides to a TrainConfig and back; every fault is a sentence."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from student_trainer.config.base import ConfigError
from student_trainer.config.run import TrainConfig

PLACEHOLDER = "<fill in>"
"""Stands for a value that must be given, in a config that `student-trainer init` wrote."""
STAGES = "stages"
"""The key that makes a file a recipe (`student_trainer.config.recipe`)."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in a TOML file, with `key.path=value` overrides (values in TOML; bare words are strings).

    Raises:
        ConfigError: the file, an override or the result is wrong.
    """
    tables = read_tables(path)
    if STAGES in tables:
        raise ConfigError(f"{path} is a recipe of several runs; give the config.toml of one, in its run folder")
    override_tables(tables, overrides)
    return parse_config(tables)


def read_tables(path: Path) -> dict[str, Any]:
    """What is in a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def override_tables(tables: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets every `key.path=value` in `tables`, after which no placeholder may be left.

    Raises:
        ConfigError: an override is not of that form, its path leads through a value, or a placeholder is left.
    """
    for override in overrides:
        _override(tables, override)
    if missing := list(_placeholders(tables)):
        raise ConfigError(f"still to be filled in: {', '.join(missing)}")


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
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, by_alias=True))


def _placeholders(tables: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys whose value is still PLACEHOLDER."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _placeholders(value, f"{prefix}{key}.")
        elif value == PLACEHOLDER:
            yield prefix + key


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
        if isinstance(part, int):
            node = node.get("items", {})
        elif part in node.get("properties", {}):
            node = node["properties"][part]
            node = next((option for option in node.get("anyOf", []) if option.get("type") != "null"), node)
        elif mapping := node.get("discriminator", {}).get("mapping"):
            node = {"$ref": mapping[part]} if part in mapping else {}
    return list(resolve(node).get("properties", {}))
