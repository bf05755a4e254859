"""The four probes on models that have learnt: the demo's teacher and student in little, and a teacher server on vLLM.

Nothing about these models is known beforehand but the direction of each measure: intervals decide, not point values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from student_trainer.cli import app
from student_trainer.config import parse_config
from student_trainer.loop import train
from student_trainer.probes.gradients import total
from student_trainer.probes.paired import Paired
from student_trainer.study.demo import OPD_OPTIM, SFT_OPTIM
from student_trainer.study.toy import RULE_MARKS, build_toy_model
from student_trainer.tasks import ToyTask
from tests.harness import LoopThread, served, server_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SUMS = ToyTask(min_terms=2, max_terms=3, train_size=580, held_out_size=130)
"""Small sums, of which a model of 0.1 M parameters learns a part in seconds; there are 810 of them."""

BACKWARDS = SUMS.model_copy(update={"rule_rate": 1.0, "show_rule": False})
"""Answers are expected reversed, and no prompt says so."""

SFT_TASK = SUMS.model_copy(update={"rule_rate": 0.3, "hint_rate": 0.3, "error_rate": 0.15})
"""As the demo's, and with prompts that tell the answer and sums taken back at once: for a teacher that can be told
either, and that hedges where a prefix holds an error."""

MAX_NEW_TOKENS = 28
"""Three terms take at most 19 tokens, and each sum that is taken back three more."""

NUM_PROBLEMS = 130
TEACHER_STEPS, STUDENT_STEPS, OPD_STEPS, OTHER_STEPS = 160, 70, 30, 20


@dataclass(frozen=True)
class Models:
    """The folders of the teacher, and of the student before and after distillation; the teacher's URL."""

    teacher: Path
    student: Path
    distilled: Path
    url: str


def trained(folder: Path, task: ToyTask, model: Path, **tables: Any) -> Path:
    """A run's last checkpoint."""
    config = {
        "run": str(folder),
        "problems_per_step": 64,
        "model": {"path": str(model)},
        "task": task.model_dump(),
        "stage": {"kind": "sft"},
        "rollout": {"max_new_tokens": MAX_NEW_TOKENS},
        "optim": {**SFT_OPTIM, "lr": 4e-3, "warmup_steps": 20},
        "eval": {"num_problems": 1},
    }
    return train(parse_config(config | tables), quiet=True)


@pytest.fixture(scope="module")
def models(run: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """As the demo makes them: both by SFT, the student stopped early and then distilled."""
    folder = tmp_path_factory.mktemp("learnt")
    initial = [build_toy_model(folder / f"initial-{seed}", hidden_size=64, seed=seed) for seed in range(2)]
    teacher = trained(folder / "teacher", SFT_TASK, initial[0], steps=TEACHER_STEPS)
    student = trained(folder / "student", SFT_TASK, initial[1], steps=STUDENT_STEPS, seed=1)
    with server_of(run, teacher, "vllm", max_items=1024) as server:
        url = server.url("grpc")
        opd = {"stage": {"kind": "opd"}, "teacher": {"url": url}, "optim": OPD_OPTIM}
        distilled = trained(folder / "opd", SUMS, student, steps=OPD_STEPS, **opd)
        yield Models(teacher, student, distilled, url)


def probe(kind: str, out: Path, student: Path, url: str, *arguments: str, task: ToyTask = SUMS) -> dict[str, Any]:
    """The result of `student-trainer probe`, in this process."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in task.model_dump(mode="json", exclude_none=True).items()]
    config = out.with_suffix(".toml")
    config.write_text("\n".join(["[task]", *lines, "[watch]", 'hedges = ["w"]']))
    asked = ["probe", kind, str(config), "--out", str(out), "--student", str(student), "--teacher", url]
    asked += [f"rollout.max_new_tokens={MAX_NEW_TOKENS}", f"eval.num_problems={NUM_PROBLEMS}", "eval.batch_size=130"]
    command, bound, _ = app.parse_args([*asked, *arguments], exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)
    return json.loads((out / "result.json").read_text())


def raw_rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in map(json.loads, (out / "raw.jsonl").read_text().splitlines())}


def test_prefix_a_teacher_is_worse_the_more_of_a_wrong_answer_it_is_given(models: Models, tmp_path: Path) -> None:
    """Every difference between answers to the same problems, with the 95 % interval of paired proportions."""
    out, cuts = tmp_path / "out", ("0.1", "0.5", "0.9")
    found = probe("prefix", out, models.student, models.url, *(f"--cut={cut}" for cut in cuts))
    assert found["tells_errors_apart"] == "exactly"
    for cut in found["cuts"]:
        assert cut["own"]["accuracy"] == pytest.approx(found["alone"]["accuracy"], abs=0.02)
    for cut in found["cuts"][1:]:
        assert cut["with_error"]["paired"]["interval"][1] < 0
        assert cut["with_error"]["student"]["accuracy_well_formed"] < cut["with_error"]["own"]["accuracy_well_formed"]
    rows = raw_rows(out)
    early, late = (
        [row["is_right"] for key, row in rows.items() if key.startswith(f"student/{cut}/")] for cut in ("0.1", "0.9")
    )
    assert Paired.of(early, late).interval[1] < 0
    mass = found["revision_mass"]
    assert mass["student_with_error"]["low"] > mass["student_without_error"]["high"]
    assert mass["student_with_error"]["low"] > mass["own"]["high"]


def test_overlap_distillation_brings_the_student_closer_and_a_teacher_of_another_habit_ranks_below(
    models: Models, tmp_path: Path, run: LoopThread
) -> None:
    """The other teacher is the same one, taught on to write its answers backwards unasked."""
    before = probe("overlap", tmp_path / "before", models.student, models.url)["teachers"][0]
    other = trained(tmp_path / "other", BACKWARDS, models.teacher, steps=OTHER_STEPS)
    with served(run, other) as url:
        after, far = probe("overlap", tmp_path / "after", models.distilled, url, "--teacher", models.url)["teachers"]
    assert (after["url"], far["url"]) == (models.url, url)
    assert far["further_than_closest"]["low"] > 0
    for measure in ("reverse_kl", "reverse_kl_listed"):  # what this distillation descends
        assert after[measure]["high"] < before[measure]["low"]


def test_loss_the_unnormalised_loss_is_biased_and_the_stop_gradient_is_not(models: Models, tmp_path: Path) -> None:
    """In each of eight parts of the problems; by chance that is so once in 2^8."""
    out = tmp_path / "out"
    chosen = ("stage.loss.kind=biased_reverse_kl", "stage.loss.top_k=3", "eval.num_problems=64")
    found = probe("loss", out, models.student, models.url, *chosen)
    assert [kind for kind, one in found["losses"].items() if one["leaks"]] == ["biased_reverse_kl"]
    rows = [row["losses"] for key, row in raw_rows(out).items() if key.startswith("gradients/")]
    for part in range(8):
        biased, still = (
            total([row[kind] for row in rows[part::8]]).figures()
            for kind in ("biased_reverse_kl", "stop_gradient_reverse_kl")
        )
        assert biased["bias_ratio"] > still["bias_ratio"]
        assert biased["cosine"] < still["cosine"]


def test_pi_a_rule_is_shared_and_an_answer_is_in_part_of_its_problem(models: Models, tmp_path: Path) -> None:
    """A rule in equal words leaves no floor. This teacher has hardly learnt to use an answer that it is told: most of
    what an answer changes any other changes too, which the probe calls mixed, and it finds the part that is the
    problem's own.
    """
    asked = ("--pis", "3", "eval.num_problems=40")
    told = ("stage.privileged.kind=system", f"stage.privileged.text={RULE_MARKS['reversed']}")
    rule = probe("pi", tmp_path / "rule", models.student, models.url, *told, *asked, task=BACKWARDS)
    told = ("stage.privileged.kind=answer", "stage.privileged.template=plain")
    answer = probe("pi", tmp_path / "answer", models.student, models.url, *told, *asked)
    assert rule["structure"] == "shared rule"
    assert rule["gain"]["interval"][0] > 0
    assert answer["structure"] != "shared rule"
    for measure in ("lost", "floor", "disagreement"):
        assert answer[measure]["low"] > rule[measure]["high"]
