import base64
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from student_trainer.config import parse_config
from student_trainer.report import write_report
from student_trainer.report.alarms import marks_of
from student_trainer.report.draw import COLORS
from student_trainer.report.headline import Fact, headline
from student_trainer.report.panels import describe, gaps, panels
from student_trainer.report.record import read_run
from student_trainer.report.series import running_median, window_of
from student_trainer.report.write import first_middle_last
from student_trainer.run_folder import Row, RunFolder

OPD: dict[str, Any] = {"kind": "opd", "loss": {"kind": "stop_gradient_reverse_kl", "top_k": 7}}
NUM_STEPS = 12
CURVE_COLORS = {ImageColor.getrgb(color) for color in COLORS}


def new_run(tmp_path: Path, stage: dict[str, Any]) -> RunFolder:
    tables: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "steps": 20,
        "model": {"path": "models/<b>student</b>"},
        "task": {"kind": "toy"},
        "stage": stage,
    }
    if stage["kind"] != "sft":
        tables["teacher"] = {"url": "http://teacher:8000"}
    return RunFolder(parse_config(tables))


def evaluation(accuracy: float) -> Row:
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": accuracy - 0.0625,
        "eval/accuracy_high": accuracy + 0.0625,
        "eval/well_formed": 0.75,
        "eval/truncation_rate": 0.25,
    }


def opd_step(step: int) -> Row:
    return {
        "step": step,
        "loss": -0.5 / step,
        "num_tokens": 1000 + step,
        "lr": 1e-5,
        "grad_norm": 2.0,
        "reverse_kl": 0.96 / step,
        "overlap_ratio": 0.25 + step / 32,
        "overlap_student_mass": 0.5,
        "overlap_teacher_mass": 0.4,
        "support_student_mass": 0.9,
        "support_teacher_mass": 0.8,
        "entropy": 1.5,
        "reward": 0.5,
        "length_mean": 20.0,
        "length_p95": 40.0,
        "truncation_rate": 0.1,
        "hedge_frequency": 0.01,
        "repeat_ratio": 0.02,
        "rollout_s": 1.0,
        "score_s": 0.5,
        "step_s": 1.75,
        "scored_tokens_per_s": 2000.0 + step,
    }


def rollout(step: int, text: str) -> Row:
    prompt = [{"role": "user", "content": "what is 2 < 3?"}]
    return {
        "step": step,
        "problem": "p1",
        "prompt": prompt,
        "text": text,
        "num_tokens": 4,
        "is_finished": False,
        "reward": 0.5,
    }


@pytest.fixture(scope="module")
def opd_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = new_run(tmp_path_factory.mktemp("opd"), OPD)
    run.log({"step": 0, **evaluation(0.125)})
    for step in range(1, NUM_STEPS + 1):
        run.log(opd_step(step) | (evaluation(0.5) if step == NUM_STEPS else {}))
        run.log_rollouts([rollout(step, f"text of step {step} <script>alert(1)</script>")])
    return run


class Page(HTMLParser):
    """What a browser would take from a page: tags, the resources it names, alternative texts and visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.source = path.read_text()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.alts: list[str] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]
        self.alts += [value or "" for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def opd_page(opd_run: RunFolder) -> Page:
    return Page(write_report(opd_run.path))


def test_headline_of_an_unfinished_run(opd_run: RunFolder) -> None:
    # Tokens: 12 * 1000 + (1 + ... + 12 = 78). Learn: 1.75 - 1 - .5. Scored tokens: median of 2001 ... 2012 = 2006.5,
    # which rounds to even. Reverse KL: .96 / 1 and .96 / 12. Overlap: 9/32 and 20/32.
    assert headline(read_run(opd_run.path)) == [
        Fact("Steps", "12 of 20", "unfinished"),
        Fact("Held-out accuracy", "12.5% (6.2% to 18.8%) → 50.0% (43.8% to 56.2%)", "step 0 → step 12; 95 % intervals"),
        Fact("Reverse KL to the teacher", "0.96 → 0.08 nats a token", "step 1 → step 12"),
        Fact("Overlap of the top-K lists", "0.281 → 0.625 of K", "step 1 → step 12"),
        Fact("Tokens trained on", "12,078"),
        Fact("Seconds a step", "1.75 s", "medians; rollout 1, score 0.5, learn 0.25"),
        Fact("Scored tokens a second", "2,006", "median"),
    ]


def test_page_holds_the_headline_and_the_config(opd_run: RunFolder, opd_page: Page) -> None:
    assert opd_page.path == opd_run.path / "report.html"
    text = opd_page.text
    for fact in headline(read_run(opd_run.path)):
        assert fact.name in text
        assert fact.value in text
        assert fact.note in text
    assert (opd_run.path / "config.toml").read_text() in text


def test_page_needs_nothing_from_outside(opd_page: Page) -> None:
    assert opd_page.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in opd_page.resources)
    assert not {"link", "script", "iframe"} & set(opd_page.tags)
    assert "url(" not in opd_page.source
    assert "@import" not in opd_page.source
    # The only address on the page is the teacher's, as text of the config.
    assert opd_page.source.count("http:") + opd_page.source.count("https:") == 1


def test_every_logged_metric_is_plotted_once(opd_run: RunFolder) -> None:
    record = read_run(opd_run.path)
    plotted = [key for group in panels(record.config).values() for panel in group for key in panel.metrics]
    logged = {key for row in record.rows for key in row}
    # The step is the axis, tokens are summed in the headline, a step's seconds are the sum of the stack, the interval
    # is the accuracy's band; an evaluation's truncation is left to metrics.jsonl.
    others = {"step", "num_tokens", "step_s", "eval/accuracy_low", "eval/accuracy_high", "eval/truncation_rate"}
    assert sorted(plotted) == sorted(logged - others | {"token_accuracy"})


def test_plots_are_png_files_and_described(opd_run: RunFolder, opd_page: Page) -> None:
    files = sorted((opd_run.path / "plots").iterdir())
    assert {file.name for file in files} == {
        f"{panel.name}.png"
        for group in panels(read_run(opd_run.path).config).values()
        for panel in group
        if panel.name != "token_accuracy"
    } | {"words.png"}
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.format == "PNG"
            colors = image.convert("RGB").getcolors(maxcolors=2**24)
            assert any(color in CURVE_COLORS for _, color in colors or []), f"{file.name} shows no curve"
    embedded = {base64.b64decode(resource.partition(",")[2]) for resource in opd_page.resources}
    assert embedded == {file.read_bytes() for file in files}
    assert len(opd_page.alts) == len(files)
    assert "Reverse KL by step. reverse KL: 0.96 at step 1, 0.08 at step 12, between 0.08 and 0.96." in opd_page.alts


def test_loss_value_is_not_called_a_divergence(opd_page: Page) -> None:
    assert "Stop-gradient reverse KL: the value is not a divergence." in opd_page.text


def test_rollouts_of_first_middle_and_last_step_are_escaped(opd_page: Page) -> None:
    text = opd_page.text
    # Of steps 1 ... 12 the middle one, index 12 // 2 = 6, is step 7. A tag that was not escaped would not be text.
    shown = [step for step in range(1, 13) if f"text of step {step} <script>alert(1)</script>" in text]
    assert shown == [1, 7, 12]
    assert "what is 2 < 3?" in text
    assert "<b>student</b>" in text
    assert "reward 0.5 · 4 tokens" in text
    assert "not finished: cut at the budget" in text


def test_rollout_is_shown_to_its_last_character(tmp_path: Path) -> None:
    run = new_run(tmp_path, OPD)
    run.log(opd_step(1))
    long = "\n" + "x" * 100_000 + "the end"
    run.log_rollouts([rollout(1, long)])
    # A browser drops one newline right after <pre>; the parser here does not, so the text's own follows it.
    assert "\n" + long in Page(write_report(run.path)).text


def test_a_few_rollouts_of_three_steps() -> None:
    rows = [{"step": step, "index": index} for step in (1, 2, 3, 4) for index in range(5)]
    chosen = first_middle_last(rows)
    assert {step: [row["index"] for row in rows] for step, rows in chosen.items()} == {
        1: [0, 1, 2],
        3: [0, 1, 2],
        4: [0, 1, 2],
    }
    assert list(first_middle_last(rows[:5])) == [1]
    assert first_middle_last([]) == {}


def test_sft_run_has_only_its_own_panels(tmp_path: Path) -> None:
    run = new_run(tmp_path, {"kind": "sft"})
    run.log({"step": 0, **evaluation(0.125)})
    for step in (1, 2):
        row = {"loss": 2.0 / step, "num_tokens": 10, "lr": 1e-5, "token_accuracy": step / 4, "grad_norm": 1.0}
        run.log({"step": step, **row, "step_s": 0.5})
    run.log_rollouts([])
    page = Page(write_report(run.path))
    assert {file.stem for file in (run.path / "plots").iterdir()} == {
        "loss",
        "accuracy",
        "token_accuracy",
        "grad_norm",
        "lr",
        "seconds",
    }
    assert "0.25 → 0.5 of tokens" in page.text
    assert "medians; learn 0.5" in page.text
    assert "Negative log-likelihood" in page.text
    for absent in ("Reverse KL", "Agreement", "Rollouts", "not a divergence", "rollout 0"):
        assert absent not in page.text


def test_run_before_its_first_step(tmp_path: Path) -> None:
    run = new_run(tmp_path, OPD)
    run.log({"step": 0, **evaluation(0.125)})
    text = Page(write_report(run.path)).text
    assert headline(read_run(run.path)) == [
        Fact("Steps", "0 of 20", "unfinished"),
        Fact("Held-out accuracy", "12.5% (6.2% to 18.8%)", "step 0; 95 % intervals"),
    ]
    assert "12.5% (6.2% to 18.8%)" in text
    assert [file.name for file in (run.path / "plots").iterdir()] == ["accuracy.png"]


def test_missing_values_stay_missing(tmp_path: Path) -> None:
    run = new_run(tmp_path, OPD)
    for step in (1, 2, 3, 4):
        run.log(opd_step(step) | {"reverse_kl": [0.5, math.nan, math.inf, 0.25][step - 1]})
    curves = next(p for p in panels(read_run(run.path).config)["Learning"] if p.name == "reverse_kl").curves(
        read_run(run.path)
    )
    assert gaps(curves) == "reverse KL: 2 of 4 values are not finite and leave gaps."
    assert describe("KL", curves).endswith("0.5 at step 1, 0.25 at step 4, between 0.25 and 0.5.")
    assert gaps(curves) in Page(write_report(run.path)).text


def test_running_median() -> None:
    # Windows of 3: {4,1}, {4,1,9}, {1,9,nan}, {9,nan,2}, {nan,2,8}, {2,8}.
    values = np.array([4.0, 1.0, 9.0, math.nan, 2.0, 8.0])
    np.testing.assert_array_equal(running_median(values, 3), [2.5, 4.0, 5.0, 5.5, 5.0, 5.0])
    np.testing.assert_array_equal(running_median(np.array([math.nan, math.inf, 1.0]), 1), [math.nan, math.nan, 1.0])


def test_window_is_odd_and_bounded() -> None:
    # 9 values are too few; 200 / 20 = 10 becomes 11; 10 000 / 20 exceeds the longest.
    assert [window_of(num) for num in (1, 9, 10, 200, 10_000)] == [1, 1, 5, 11, 51]


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.toml$"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_run_without_metrics_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path, OPD)
    with pytest.raises(ValueError, match="has no metrics yet"):
        write_report(run.path)


def alarm(step: int, signal: str) -> Row:
    return {"step": step, "signal": signal, "action": "warn", "sentence": f"{signal} is low at {step}"}


def test_alarms_in_a_row_are_one_mark() -> None:
    # Of 100 steps, alarms of one signal up to 5 apart are one stretch; 30 is 16 from 14.
    rows = [alarm(step, "entropy") for step in (10, 14, 30)] + [alarm(12, "loss")]
    marks = [(m.letter, m.signal, m.step, m.last_step, m.count) for m in marks_of(rows, 100)]
    assert marks == [("A", "entropy", 10, 14, 2), ("B", "loss", 12, 12, 1), ("C", "entropy", 30, 30, 1)]


def test_page_shows_alarms_words_and_advantages(tmp_path: Path) -> None:
    run = new_run(tmp_path, OPD)
    for step in (1, 2, 3):
        run.log(opd_step(step) | {"clip_fraction": 0.5})
        told = {"tokens": ["so ", "<wait>"], "teacher_advantage": [0.25, -9.0]}
        run.log_rollouts([rollout(step, "so wait " * step + "so") | told])
    run.log_alarm(alarm(2, "overlap_ratio"))
    page = Page(write_report(run.path))
    assert "overlap_ratio is low at 2" in page.text
    # Step 1: 1 of 3 words is "wait"; step 3: 3 of 7.
    assert any("wait 333 → 429" in alt for alt in page.alts)
    # -9 nats is beyond the full colour; .25 of 3 nats is less than half of a fifth.
    assert '<span class="a-5" title="&#39;&lt;wait&gt;&#39;: -9.00 nats">&lt;wait&gt;</span>' in page.source
    assert '<span class="a0" title="&#39;so &#39;: +0.25 nats">so </span>' in page.source
    assert "Mean teacher advantage -4.38 nats; lowest: '<wait>' (-9.00), 'so ' (+0.25)." in page.text
    assert (run.path / "plots" / "clip_fraction.png").exists()


BROWSER = shutil.which("chromium")


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed: the report is not looked at in a browser")
@pytest.mark.slow
def test_page_in_a_browser_is_drawn_without_an_error(opd_page: Page, tmp_path: Path) -> None:
    assert BROWSER is not None
    picture = tmp_path / "report.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --window-size=1200,3000"
    )
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    done = subprocess.run([*command, opd_page.path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    # The page's own policy forbids every request; one that was tried would stand on the console.
    assert "CONSOLE" not in done.stderr
    with Image.open(picture) as image:
        assert image.size == (1200, 3000)
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24) or []}
    assert colors & CURVE_COLORS, "no curve is drawn"
