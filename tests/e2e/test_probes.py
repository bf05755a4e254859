"""The four probes against real servers, whose models are made so that the answer is known before it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from student_trainer.cli import app
from student_trainer.config import ConfigError
from student_trainer.study.toy import VOCABULARY, build_toy_model
from student_trainer.tasks import ToyTask, build_task
from tests.harness import LoopThread, served

HIDDEN, FEATURES = 64, 32
V = len(VOCABULARY)
ID = {token: index for index, token in enumerate(VOCABULARY)}
EOS = "<eos>"

SURE, LIKELY, TOLD = 60.0, 5.0, 100.0
"""Logits: of a step that nothing changes, of one that something in the context can change, and of that something,
which is divided by the tokens of the context: at most ten here, so that 10 beats 5 and not 60."""


def build_known_model(
    folder: Path, steps: Mapping[str, Mapping[str, float]], heard: Mapping[str, str] | None = None
) -> Path:
    """A Qwen3 whose next logits are known: steps[last][next], plus TOLD times the share of the context that is `token`
    for heard[token].

    The embedding is one-hot, the attention even (queries are 0) and its values the tokens that are heard, the rest of
    the weights 0; the final norm multiplies by sqrt(HIDDEN), as the residual's norm is 1 up to FEATURE squared.
    """
    feature, norm = 0.02, HIDDEN**0.5
    build_toy_model(folder, hidden_size=HIDDEN, num_layers=1)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :V] = torch.eye(V)
        for last, following in steps.items():
            for token, logit in following.items():
                model.lm_head.weight[ID[token], ID[last]] = logit / norm
        attention = model.model.layers[0].self_attn
        for token, wanted in (heard or {}).items():
            attention.v_proj.weight[ID[token], ID[token]] = 1 / norm
            attention.o_proj.weight[FEATURES + ID[token], ID[token]] = feature
            model.lm_head.weight[ID[wanted], FEATURES + ID[token]] = TOLD / feature / norm
    model.save_pretrained(folder)
    return folder


def path(text: str) -> dict[str, dict[str, float]]:
    """Steps that surely write `text` after a prompt, and then EOS."""
    tokens = [":", *text, EOS]
    return {last: {following: SURE} for last, following in pairwise(tokens)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The teacher knows 1+2=3 and takes a 4 back, too late; the student writes the 4, but not where the prompt has a T.

    "told" says 0 unless there is a digit in its context, which it says, or an R, for which it says w.
    """
    folder = tmp_path_factory.mktemp("known")
    teacher = path("1+2=3") | {"4": {"w": SURE}, "w": {"5": SURE}, "5": {EOS: SURE}}
    student = path("1+2=3") | {"+": {"4": LIKELY}, "4": {"5": SURE}, "5": {EOS: SURE}}
    digits = "0123456789"
    told = {":": {"0": LIKELY}} | {token: {EOS: SURE} for token in (*digits, "w")}
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, V, V))

    def soft(logits: np.ndarray) -> dict[str, dict[str, float]]:
        return {a: {b: float(logits[i, j]) for j, b in enumerate(VOCABULARY)} for i, a in enumerate(VOCABULARY)}

    made = {
        "teacher": build_known_model(folder / "teacher", teacher),
        "student": build_known_model(folder / "student", student, {"T": "2"}),
        "told": build_known_model(folder / "told", told, {digit: digit for digit in digits} | {"R": "w"}),
    }
    for name, logits in (("soft", noise[0]), ("near", noise[0] + 0.3 * noise[1]), ("far", noise[0] + noise[2])):
        made[name] = build_known_model(folder / name, soft(logits))
    return made


@pytest.fixture(scope="module")
def urls(run: LoopThread, models: dict[str, Path]):
    """A server of each model."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(served(run, model)) for name, model in models.items()}


PROMPTS = [a + b for a in "+=;m" for b in "+=;m"]
"""Prompts without a digit."""


def write_task(folder: Path, answers: Sequence[str], prompts: Sequence[str], reward: str) -> Path:
    """A task file; ten problems are held out, and one is left to train on."""
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "w", "answer": answers[0]}) + "\n")
    task = folder / "task.toml"
    task.write_text(
        f'[task]\nkind = "jsonl"\npath = "{folder / "train.jsonl"}"\nheld_out_path = "{folder / "held_out.jsonl"}"\n'
        f'reward = "{reward}"\n[rollout]\nmax_new_tokens = 8\n[watch]\nhedges = ["w"]\n'
    )
    return task


def probe(kind: str, task: Path, out: Path, *arguments: Any) -> dict[str, Any]:
    """The result of `student-trainer probe`, in this process, after its files are found to be there."""
    tokens = ["probe", kind, str(task), "eval.num_problems=10", "--out", str(out), *map(str, arguments)]
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "result.json").read_text())


CUTS = ("--cut", 0.3, "--cut", 0.7)


def test_a_teacher_is_worse_on_a_students_wrong_prefix_and_wants_to_take_it_back(tmp_path, models, urls, capsys):
    """In four of ten prompts there is a T: the student is right there, and wrong, by a 4, in six.

    "1+45" and EOS are five tokens: at .3 the prefix is "1", after which the teacher is right; at .7 it is "1+4", and
    the teacher's "w5" makes a 5 of it. McNemar: 2 / 2^6 = .03125.
    """
    prompts = [*PROMPTS[:6], *("T" + prompt for prompt in PROMPTS[:4])]
    task = write_task(tmp_path, ["3"] * 10, prompts, "number")
    found = probe(
        "prefix", task, tmp_path / "path", "--student", models["student"], "--teacher", urls["teacher"], *CUTS
    )
    assert found["alone"]["accuracy"] == 1
    assert found["student_alone"]["accuracy"] == 0.4
    early, late = found["cuts"]
    assert (early["own"]["accuracy"], early["student"]["accuracy"], early["paired"]["p_value"]) == (1, 1, 1)
    assert (late["own"]["accuracy"], late["student"]["accuracy"]) == (1, 0.4)
    assert (late["paired"]["right_to_wrong"], late["paired"]["wrong_to_right"]) == (6, 0)
    assert late["paired"]["p_value"] == 0.03125
    assert late["student"]["well_formed"] == 1
    assert late["with_error"]["student"]["accuracy"] == 0
    assert late["without_error"]["student"]["accuracy"] == 1
    mass = found["revision_mass"]
    assert mass["own"]["mean"] == pytest.approx(0, abs=1e-6)
    assert mass["student_without_error"]["mean"] == pytest.approx(0, abs=1e-6)
    assert mass["student_with_error"]["mean"] == pytest.approx(1 / 5, abs=1e-3)  # after the 4, of : 1 + 4 5
    assert "McNemar" in capsys.readouterr().out

    by_url = ("model.path=" + str(models["student"]), "--student", urls["student"], "--teacher", urls["teacher"])
    assert probe("prefix", task, tmp_path / "url", *by_url, *CUTS) == found


def test_a_budget_stops_a_probe_and_a_larger_one_ends_it_as_if_it_had_not(tmp_path, models, urls, capsys):
    task = write_task(tmp_path, ["3"] * 10, PROMPTS[:10], "number")
    asked = ("eval.batch_size=2", "--student", models["student"], "--teacher", urls["teacher"], *CUTS)
    whole = probe("prefix", task, tmp_path / "whole", *asked)
    part = probe("prefix", task, tmp_path / "parts", *asked, "--max-tokens-total", whole["num_tokens"] // 2)
    assert 0 < part["num_tokens"] <= whole["num_tokens"] // 2
    assert 0 < part["num_problems"] < 10
    assert part["num_left"] == 10 - part["num_problems"]
    assert "Stopped at the budget" in " ".join(capsys.readouterr().out.split())
    assert probe("prefix", task, tmp_path / "parts", *asked, "--max-tokens-total", 10_000) == whole
    with pytest.raises(ConfigError, match=r"another cuts .*choose another --out"):
        probe("prefix", task, tmp_path / "parts", *asked[:-2])
    with pytest.raises(ConfigError, match="does not reach for one problem"):
        probe("prefix", task, tmp_path / "none", *asked, "--max-tokens-total", 5)


def test_in_the_toy_world_a_prefix_with_an_error_is_known_exactly(tmp_path, models, urls):
    """The student begins every answer with 1, which is wrong from there on unless the sum begins with 1 (a right answer
    may also be the total alone, after an m).
    """
    task = tmp_path / "task.toml"
    task.write_text(
        '[task]\nkind = "toy"\nmin_terms = 2\nmax_terms = 2\ntrain_size = 5\nheld_out_size = 10\n'
        '[rollout]\nmax_new_tokens = 8\n[watch]\nhedges = ["w"]\n'
    )
    asked = ("--student", models["student"], "--teacher", urls["teacher"], "--cut", 0.3)
    found = probe("prefix", task, tmp_path / "out", *asked)
    begins = [
        problem.messages[-1].content[0]
        for problem in build_task(ToyTask(min_terms=2, max_terms=2, train_size=5, held_out_size=10)).held_out
    ]
    assert found["tells_errors_apart"] == "exactly"
    assert found["cuts"][0]["with_error"]["student"]["num_answers"] == sum(first != "1" for first in begins)
    assert found["cuts"][0]["without_error"]["student"]["num_answers"] == sum(first == "1" for first in begins)


def test_the_closer_teacher_ranks_first_whatever_the_order_and_its_divergence_is_exact(tmp_path, models, urls):
    """Both ways, over the whole vocabulary, the divergence at a token is that of two rows of the known tables."""
    task = write_task(tmp_path, ["3"] * 10, PROMPTS[:10], "number")
    teachers = ("--teacher", urls["far"], "--teacher", urls["near"], "--teacher", urls["soft"])
    found = probe("overlap", task, tmp_path / "out", "--student", models["soft"], *teachers, "--top-k", V)
    assert [teacher["url"] for teacher in found["teachers"]] == [urls[name] for name in ("soft", "near", "far")]
    same, near, far = found["teachers"]
    assert same["reverse_kl_listed"]["mean"] == pytest.approx(0, abs=1e-5)
    assert same["reverse_kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert near["further_than_closest"]["low"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "raw.jsonl").read_text().splitlines()]
    texts = [row["token_ids"] for row in rows if row["key"].startswith("student/")]
    last = np.array([token for ids in texts for token in (ID[":"], *ids[:-1])])
    table = {name: log_table(models[name]) for name in ("soft", "near", "far")}
    for teacher, name in ((near, "near"), (far, "far")):
        logp, logq = table["soft"][last], table[name][last]
        exact = (np.exp(logp) * (logp - logq)).sum(-1).mean(), (np.exp(logq) * (logq - logp)).sum(-1).mean()
        assert teacher["reverse_kl_listed"]["mean"] == pytest.approx(exact[0], abs=1e-4)
        assert teacher["forward_kl_listed"]["mean"] == pytest.approx(exact[1], abs=1e-4)
        assert teacher["entropy_gap"]["mean"] == pytest.approx(
            (-(np.exp(logp) * logp).sum(-1) + (np.exp(logq) * logq).sum(-1)).mean(), abs=1e-4
        )


def log_table(model: Path) -> np.ndarray:
    """log of the next token's distribution after each token, [V, V]."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return torch.log_softmax(loaded(torch.arange(V)[:, None]).logits[:, 0], -1).double().numpy()


def test_the_unnormalised_loss_is_warned_of_and_stop_gradient_over_the_vocabulary_is_not(
    tmp_path, models, urls, capsys
):
    task = write_task(tmp_path, ["3"] * 10, PROMPTS[:10], "number")
    models_of = ("--student", models["soft"], "--teacher", urls["near"])
    biased = ("stage.loss.kind=biased_reverse_kl", "stage.loss.top_k=4")
    found = probe("loss", task, tmp_path / "biased", *models_of, *biased)
    losses = found["losses"]
    assert found["chosen"] == "biased_reverse_kl"
    assert found["is_exact"]
    assert [kind for kind, one in losses.items() if one["leaks"]] == ["biased_reverse_kl"]
    assert losses["biased_reverse_kl"]["bias_ratio"] > 0.1
    assert losses["stop_gradient_reverse_kl"]["cosine"] > losses["biased_reverse_kl"]["cosine"]
    assert "WARNING, this loss leaks" in " ".join(capsys.readouterr().out.split())

    whole = (f"stage.loss.top_k={V}",)
    found = probe("loss", task, tmp_path / "whole", *whole, *models_of)
    chosen = found["losses"]["stop_gradient_reverse_kl"]
    assert chosen["cosine"] == pytest.approx(1, abs=1e-5)
    assert chosen["relative_norm"] == pytest.approx(1, abs=1e-4)
    assert not any(one["leaks"] for one in found["losses"].values())
    assert "No leak" in capsys.readouterr().out


def test_a_loss_is_probed_against_the_teacher_that_is_told(tmp_path, models, urls):
    """The teacher is the student: without the rule it pulls at nothing, and with it at the first token."""
    task = write_task(tmp_path, ["w"] * 10, PROMPTS[:10], "exact")
    model = ("stage.loss.top_k=4", "--student", models["told"], "--teacher", urls["told"])
    same = probe("loss", task, tmp_path / "same", *model)["losses"]["stop_gradient_reverse_kl"]
    told = probe("loss", task, tmp_path / "told", "stage.privileged.kind=system", "stage.privileged.text=R", *model)[
        "losses"
    ]["stop_gradient_reverse_kl"]
    assert (same["cosine"], same["pull_norm"]) == (1, pytest.approx(0, abs=1e-5))
    assert told["pull_norm"] > 0.1


def test_a_shared_rule_and_an_answer_of_each_problem_are_told_apart(tmp_path, models, urls):
    """Told its digit or the rule, the teacher goes from nothing right to everything; only the rule can be kept."""
    model = ("--student", models["told"], "--teacher", urls["told"])
    (tmp_path / "answer").mkdir()
    task = write_task(tmp_path / "answer", list("1234567891"), PROMPTS[:10], "exact")
    answer = ("stage.privileged.kind=answer", "stage.privileged.template=plain")
    instance = probe("pi", task, tmp_path / "answer" / "out", *answer, *model)
    assert (instance["untold"]["accuracy"], instance["told"]["accuracy"]) == (0, 1)
    assert instance["structure"] == "instance-specific"
    assert instance["share_kept"] < 0.05
    assert instance["floor"]["mean"] > 0.5
    assert instance["disagreement"]["mean"] > 0.5
    assert instance["num_distinct_pis"] == 9

    (tmp_path / "rule").mkdir()
    task = write_task(tmp_path / "rule", ["w"] * 10, PROMPTS[:10], "exact")
    shared = probe(
        "pi", task, tmp_path / "rule" / "out", "stage.privileged.kind=system", "stage.privileged.text=R", *model
    )
    assert (shared["untold"]["accuracy"], shared["told"]["accuracy"]) == (0, 1)
    assert shared["structure"] == "shared rule"
    assert shared["share_kept"] == pytest.approx(1, abs=1e-6)
    assert shared["floor"]["mean"] == pytest.approx(0, abs=1e-6)
