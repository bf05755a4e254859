"""A config that `init` wrote: every stage's is complete once its placeholders are filled in."""

from __future__ import annotations

import re
import tomllib
from typing import Any, get_args

import pytest

from student_trainer.config import ConfigError, TrainConfig, load_config, parse_config
from student_trainer.config.parse import PLACEHOLDER
from student_trainer.init import config_text, kinds, write_config
from student_trainer.tasks import TaskConfig

TASKS = [member.model_fields["kind"].default for member in get_args(get_args(TaskConfig)[0])]
TRIED = ("x", 1, 0.5, [1])
"""What a person might fill in: for each key the first that is not refused."""


def filled(text: str) -> TrainConfig:
    """Every placeholder replaced, key by key, by the first value that the config's own errors do not name."""
    for _ in range(text.count(f'"{PLACEHOLDER}"')):
        candidate = text
        for value in TRIED:
            candidate = text.replace(f'"{PLACEHOLDER}"', repr(value).replace("'", '"'), 1)
            try:
                return parse_config(tomllib.loads(candidate.replace(f'"{PLACEHOLDER}"', '"y"')))
            except ConfigError as error:
                key = key_of_first_placeholder(text)
                if not re.search(rf"^(\w+\.)*{key}: ", str(error), re.MULTILINE):
                    break
        text = candidate
    return parse_config(tomllib.loads(text))


def key_of_first_placeholder(text: str) -> str:
    found = re.search(rf'^(\w+) = "{PLACEHOLDER}"$', text, re.MULTILINE)
    assert found
    return found[1]


def live(text: str) -> str:
    """Without comments, so that only what stands in the file is filled in."""
    return "".join(line + "\n" for line in text.splitlines() if not line.startswith("#"))


def test_there_is_a_config_for_every_stage():
    stages: Any = TrainConfig.model_json_schema()["properties"]["stage"]
    assert sorted(kinds()) == sorted(stages["discriminator"]["mapping"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", kinds())
def test_a_filled_config_parses_and_holds_only_defaults_besides(kind, task):
    config = filled(live(config_text(kind, task)))
    assert (config.stage.kind, config.task.kind) == (kind, task)
    assert config.optim == TrainConfig.model_fields["optim"].default


@pytest.mark.parametrize("kind", kinds())
def test_the_defaults_that_are_commented_out_are_the_defaults(kind):
    text = config_text(kind, "toy")
    # Optional tables are commented out whole, up to a blank line.
    blocks = [block for block in text.split("\n\n") if not re.search(r"^#\[", block, re.MULTILINE)]
    lines = [line for line in "\n".join(blocks).splitlines() if not re.match(f'#\\w+ = "{PLACEHOLDER}"', line)]
    with_defaults = live("\n".join(re.sub("^#(?! )", "", line) for line in lines))
    assert len(with_defaults.splitlines()) > len(live(text).splitlines()) + 10
    assert filled(with_defaults) == filled(live(text))


def test_every_docstring_of_a_field_is_a_comment():
    text = " ".join(line.removeprefix("# ") for line in config_text("opd", "toy").splitlines())
    for field in TrainConfig.model_fields.values():
        assert " ".join((field.description or "").split("\n\n")[0].split()) in text


def test_a_file_is_never_overwritten_and_a_wrong_name_is_answered_with_the_right_ones(tmp_path):
    out = tmp_path / "opd.toml"
    write_config("opd", "jsonl", out)
    with pytest.raises(ConfigError, match=r"opd\.toml exists and is not overwritten: choose another --out"):
        write_config("sft", "jsonl", out)
    assert 'kind = "opd"' in out.read_text()
    with pytest.raises(ConfigError, match=r"stage kind 'opdd' does not exist: choose one of sft, opd"):
        write_config("opdd", "jsonl", tmp_path / "x.toml")
    with pytest.raises(ConfigError, match=r"task kind 'gsm' does not exist: choose one of jsonl, dataset"):
        write_config("opd", "gsm", tmp_path / "x.toml")


def test_a_config_that_is_not_filled_in_names_what_is_left(tmp_path):
    out = tmp_path / "opd.toml"
    write_config("opd", "toy", out)
    with pytest.raises(ConfigError, match=r"still to be filled in: run, model\.path$"):
        load_config(out, ["steps=3", "teacher.url=grpc://localhost:1"])
