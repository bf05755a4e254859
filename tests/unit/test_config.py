from pathlib import Path

import pytest

from student_trainer.config import ConfigError, dump_config, load_config, parse_config

CONFIGS = Path(__file__).parents[2] / "student_trainer" / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.toml") if not path.stem.startswith("recipe"))

OPD = """
run = "runs/x"
steps = 10
[model]
path = "m"
[task]
kind = "toy"
[teacher]
url = "grpc://localhost:8001"
[stage]
kind = "opd"
"""


@pytest.fixture
def opd(tmp_path) -> Path:
    path = tmp_path / "opd.toml"
    path.write_text(OPD)
    return path


def test_the_default_loss_is_the_recommended_one(opd):
    loss = load_config(opd).stage.loss  # pyright: ignore[reportAttributeAccessIssue]
    assert (loss.kind, loss.support, loss.top_k) == ("stop_gradient_reverse_kl", "student", 20)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_there_are_shipped_configs():
    assert {path.stem for path in SHIPPED} >= {"sft", "opd", "opsd", "grpo", "ppo"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("task.opd.x=1", "task.toy.opd: unknown key; known keys: "),
        ("stage.los.kind=1", "stage.opd.los: unknown key; did you mean 'loss'?"),
        ("teacher.urll=1", "teacher.urll: unknown key; did you mean 'url'?"),
        ("stage.loss.top_kk=1", "stage.opd.loss.top_kk: unknown key; did you mean 'top_k'?"),
        ("stage.loss.bta=0.5", "stage.opd.loss.bta: unknown key; did you mean 'beta'?"),
        ("stage.loss.beta=0.5", "stage.opd.loss: beta is of jsd alone, and kind is stop_gradient_reverse_kl"),
        (
            "stage.loss.importance=clipped",
            "stage.opd.loss: importance is of sampled-token losses (k2, k3, policy_gradient)",
        ),
        ("stage.loss.kind=k1", "stage.opd.loss.kind: 'k1' is no loss: log p - log q differentiated directly"),
        ("stage.loss.kind=state_advantage", "is no loss: an advantage that is the same for every token"),
        ("stage.loss.temperature=2", "stage.opd.loss: temperature: a loss has no temperature of its own"),
        ("steps=0", "steps: Input should be greater than 0 (got 0)"),
        ("rollout.temperature=-1", "rollout.temperature: Input should be greater than 0 (got -1)"),
        ("stage.kind=opdd", "stage: "),
        ("steps", "override 'steps' is not KEY=VALUE"),
        ("steps.x=1", "override 'steps.x=1': steps is a value, not a table"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_fix(opd, override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(opd, [override])
    assert expected in str(caught.value)


def test_overrides_are_toml_values_and_bare_words_are_strings(opd):
    config = load_config(
        opd, ["optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "teacher.url=http://h:1", "eval.every_steps=5"]
    )
    assert config.optim.lr == 3e-4
    assert config.optim.betas == (0.8, 0.9)
    assert config.teacher is not None
    assert config.teacher.url == "http://h:1"
    assert config.eval.every_steps == 5


def test_a_stage_with_a_teacher_needs_its_url(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(OPD.replace('[teacher]\nurl = "grpc://localhost:8001"\n', ""))
    with pytest.raises(ConfigError, match=r"stage opd needs a teacher: set teacher\.url or pass --teacher URL"):
        load_config(path)


def test_self_distillation_needs_privileged_information(opd):
    with pytest.raises(ConfigError, match=r"stage\.opsd\.privileged: missing"):
        load_config(opd, ["stage.kind=opsd"])


def test_a_missing_file_and_a_file_that_is_not_toml_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(tmp_path / "bad.toml")


def test_every_missing_key_is_listed():
    with pytest.raises(ConfigError) as caught:
        parse_config({"steps": 1})
    assert set(str(caught.value).splitlines()) == {f"{key}: missing" for key in ("run", "model", "task", "stage")}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.url=grpc://localhost:8001"], "rollout.url and teacher.url are both grpc://localhost:8001"),
        (["stage.kind=sft", "rollout.max_staleness=1"], "rollout.max_staleness is 1, and stage sft collects nothing"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(opd, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(opd, overrides)
