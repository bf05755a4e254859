"""Several runs on one page, and the entropy by position on a run's own."""

import base64
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from student_trainer.config import parse_config
from student_trainer.report import write_comparison, write_report
from student_trainer.report.compare import Line, differences, final_figures, names_of
from student_trainer.report.deciles import profiles_of
from student_trainer.report.draw import COLORS
from student_trainer.report.record import read_run
from student_trainer.run_folder import Row, RunFolder
from tests.unit.test_report import OPD, Page, evaluation, opd_step


def new_folder(path: Path, **tables: Any) -> RunFolder:
    base: dict[str, Any] = {
        "run": str(path),
        "steps": 20,
        "model": {"path": "m"},
        "task": {"kind": "toy"},
        "stage": OPD,
        "teacher": {"url": "http://teacher:8000"},
    }
    return RunFolder(parse_config(base | tables))


def new_run(path: Path, steps: int, logged: Row, **tables: Any) -> Path:
    """A run of which `steps` of 20 are done, each with little beside `logged`."""
    run = new_folder(path, **tables)
    for step in range(1, steps + 1):
        run.log({"step": step, "num_tokens": 1000 + step, "step_s": 1.75, "loss": 0.5} | logged)
    return path


def new_opd_run(run: RunFolder, steps: int, logged: Row) -> Path:
    """The same, with everything that an OPD step logs."""
    run.log({"step": 0, **evaluation(0.125)})
    for step in range(1, steps + 1):
        run.log(opd_step(step) | logged | (evaluation(0.5) if step == steps else {}))
    return run.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    loss = {"kind": "biased_reverse_kl", "top_k": 7}
    biased = new_folder(folder / "biased", stage={"kind": "opd", "loss": loss}, optim={"lr": 1e-3})
    biased.log_alarm({"step": 3, "signal": "support_gap", "action": "warn", "sentence": "low"})
    return [
        new_opd_run(new_folder(folder / "plain"), 12, {}),
        new_opd_run(biased, 4, {"entropy": 0.75, "clip_fraction": 0.5}),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Page:
    return Page(write_comparison(runs, runs[0].parent / "new" / "report.html"))


def test_final_figures_are_those_of_each_run(runs: list[Path]) -> None:
    records = {run.name: read_run(run) for run in runs}
    lines = {line.name: line.values for line in final_figures(records)}
    assert lines["Steps"] == ("12 of 20", "4 of 20")
    assert lines["Held-out accuracy, 95 % interval"] == (
        "50.0% (43.8% to 56.2%), step 12",
        "50.0% (43.8% to 56.2%), step 4",
    )
    # Of 12 values .96 / step the window is 5, at the end 10, 11, 12 alone: .96 / 11. Four values are not smoothed: .24.
    assert lines["Reverse KL, nats a token"] == ("0.0873", "0.24")
    assert lines["Entropy, nats"] == ("1.5", "0.75")
    # 12 * 1000 + 78 and 4 * 1000 + 10.
    assert lines["Tokens trained on"] == ("12,078", "4,010")
    assert lines["Alarms"] == ("none", "1, first at step 3: support_gap")
    assert "Token accuracy" not in lines


def test_only_keys_that_differ_are_told(runs: list[Path]) -> None:
    assert differences({run.name: read_run(run).config for run in runs}) == [
        Line("stage.loss.kind", ("stop_gradient_reverse_kl", "biased_reverse_kl")),
        Line("optim.lr", ("1e-05", "0.001")),
    ]


def test_a_key_that_one_run_does_not_have_is_a_dash(tmp_path: Path, runs: list[Path]) -> None:
    sft = read_run(new_run(tmp_path / "sft", 1, {}, stage={"kind": "sft"})).config
    lines = {line.name: line.values for line in differences({"opd": read_run(runs[0]).config, "sft": sft})}
    assert lines["stage.kind"] == ("opd", "sft")
    assert lines["stage.loss.top_k"] == ("7", "–")


def test_the_page_holds_both_runs_and_needs_nothing_from_outside(runs: list[Path], page: Page) -> None:
    assert page.path == runs[0].parent / "new" / "report.html"
    for text in ("stage.loss.kind", "biased_reverse_kl", "0.0873", "1, first at step 3: support_gap"):
        assert text in page.text
    assert page.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert "http:" not in page.source
    assert "https:" not in page.source
    # Every figure is told in words, run by run.
    assert len(page.alts) == page.tags.count("img") == page.tags.count("figure")
    assert (
        "Reverse KL by step. plain: 0.96 at step 1, 0.08 at step 12, between 0.08 and 0.96. "
        "biased: 0.96 at step 1, 0.24 at step 4, between 0.24 and 0.96." in page.alts
    )
    # Two values of one panel are two plots; a metric that one run alone has logged is there too.
    assert {"Mass on the support: P, student", "Mass on the support: Q, teacher", "clip_fraction"} <= set(
        page.text.splitlines()
    )
    # What the two losses' values mean is not the same.
    assert "plain: Stop-gradient reverse KL: the value is not a divergence." in page.text
    assert "biased: The value that biased_reverse_kl descends" in page.text


def test_a_run_keeps_its_colour_where_the_other_has_no_curve(page: Page) -> None:
    blue, vermilion = (ImageColor.getrgb(color) for color in COLORS[:2])
    shown = [pair for pair in zip(page.alts, page.resources, strict=True) if pair[0].startswith(("Loss ", "clip_"))]
    assert [("plain: " in alt) for alt, _ in shown] == [True, False]
    for alt, resource in shown:
        with Image.open(BytesIO(base64.b64decode(resource.partition(",")[2]))) as image:
            colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24) or []}
        assert (blue in colors, vermilion in colors) == (("plain: " in alt), ("biased: " in alt)), alt


def test_runs_are_named_by_as_much_of_their_folders_as_is_needed(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "opd", tmp_path / "b" / "opd", tmp_path / "b" / "sft"]
    assert names_of(paths) == ["a/opd", "b/opd", "sft"]
    with pytest.raises(ValueError, match="is given twice: a run is compared with others"):
        names_of([*paths, tmp_path / "b" / ".." / "a" / "opd"])


def test_more_runs_than_colours_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(ValueError, match="8 runs: no more than 7 can be told apart"):
        write_comparison(runs * 4, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def by_position(*values: float) -> dict[str, float]:
    return {f"entropy_decile_{d}": value for d, value in enumerate(values)}


def test_a_profile_is_the_mean_of_its_steps_and_has_no_value_where_there_was_no_token() -> None:
    rows = [{"step": step, **by_position(step, 0.0, math.nan)} for step in range(1, 10)]
    rows[8] |= by_position(9.0, 4.0, math.nan)
    first, middle, last = profiles_of(rows)
    # A third of nine steps each: 1 to 3, 4 to 6, 7 to 9.
    assert [profile.label for profile in (first, middle, last)] == ["steps 1 to 3", "steps 4 to 6", "steps 7 to 9"]
    assert [profile.entropy_D[0] for profile in (first, middle, last)] == [2, 5, 8]
    # Exactly 0 is a position without a token: of the last three steps one had any.
    assert math.isnan(first.entropy_D[1])
    assert last.entropy_D[1] == 4
    assert all(math.isnan(profile.entropy_D[2]) for profile in (first, middle, last))


def test_two_steps_are_two_profiles_and_none_is_none() -> None:
    rows = [{"step": 3, **by_position(1.0)}, {"step": 4}, {"step": 5, **by_position(2.0)}]
    assert [profile.label for profile in profiles_of(rows)] == ["step 3", "step 5"]
    assert profiles_of([{"step": 1}]) == []


def test_the_entropy_by_position_is_a_plot_of_a_run_that_has_it_and_of_no_other(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", 6, by_position(*(0.1 * d for d in range(1, 11))))
    page = Page(write_report(run))
    assert (run / "plots" / "entropy_by_position.png").exists()
    assert any(alt.startswith("Entropy by position, in nats. steps 1 to 2: 0.1, 0.2, 0.3,") for alt in page.alts)
    assert "entropy_decile" not in page.text
    other = new_run(tmp_path / "other", 6, {})
    assert "Entropy by position" not in Page(write_report(other)).text
    both = Page(write_comparison([run, other], tmp_path / "report.html"))
    assert "Entropy by position, in nats. run: 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1." in both.alts
