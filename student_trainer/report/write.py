"""Writes a run's `report.html`, one file with everything inside, and its `plots/*.png`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from student_trainer.report import advantage, deciles
from student_trainer.report.alarms import Mark, marks_of
from student_trainer.report.deciles import profiles_of
from student_trainer.report.draw import png, png_of_profiles, png_of_words
from student_trainer.report.headline import headline
from student_trainer.report.panels import Panel, describe, gaps, other_panels, panels
from student_trainer.report.record import RunRecord, read_run
from student_trainer.report.words import changed_words, samples_of
from student_trainer.run_folder import Row

NUM_ROLLOUTS = 3
"""Rollouts shown of one step: enough to see a habit, few enough to read."""

DECILES_TITLE = "Entropy by position"
DECILES_CAPTION = "Of the student, mean over the tokens in each tenth of their completions: where it is unsure."


@dataclass(frozen=True)
class Plot:
    """A drawn panel: its picture as a data URL, the same in words, and what to know of it."""

    title: str
    caption: str
    alt: str
    url: str


def write_report(run: Path) -> Path:
    """Writes `report.html` and `plots/*.png` into the run folder, finished or not; returns the report's path.

    Raises:
        ValueError: `run` is not a run folder, or has no metrics yet.
    """
    record = read_run(run)
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    marks = marks_of(record.alarms, record.rows[-1]["step"])
    groups = {
        title: [plot for panel in group if (plot := _plot(panel, record, folder, marks))]
        for title, group in (panels(record.config) | {"Other": other_panels(record)}).items()
    }
    if by_position := _plot_of_deciles(record, folder):
        groups.setdefault("Health", []).append(by_position)
    page = template("report.html.jinja").render(
        config=record.config,
        config_text=record.config_text,
        facts=headline(record),
        groups={title: plots for title, plots in groups.items() if plots},
        rollouts=first_middle_last(record.rollouts),
        marks=marks,
        words=_plot_of_words(record, folder),
        advantage=advantage,
        has_advantages=any("teacher_advantage" in row for row in record.rollouts),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def first_middle_last(rollouts: Sequence[Row]) -> dict[int, list[Row]]:
    """The first few rollouts of the first, the middle and the last step that have any, by step."""
    steps = sorted({row["step"] for row in rollouts})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return {step: [row for row in rollouts if row["step"] == step][:NUM_ROLLOUTS] for step in chosen}


def _plot_of_deciles(record: RunRecord, folder: Path) -> Plot | None:
    """The entropy by position; None for a run that has not logged it."""
    profiles = profiles_of(record.train_rows)
    if not profiles:
        return None
    image = png_of_profiles(profiles)
    (folder / "entropy_by_position.png").write_bytes(image)
    words = " ".join(map(deciles.describe, profiles))
    return Plot(DECILES_TITLE, DECILES_CAPTION, f"{DECILES_TITLE}, in nats. {words}", data_url(image))


def _plot_of_words(record: RunRecord, folder: Path) -> Plot | None:
    """The words that changed most; None for a run without three steps of rollouts."""
    samples = samples_of(record.rollouts)
    if not samples:
        return None
    words = changed_words(samples)
    image = png_of_words(words, samples)
    (folder / "words.png").write_bytes(image)
    rose = ", ".join(f"{word.text} {word.per_thousand[0]:.3g} → {word.per_thousand[-1]:.3g}" for word in words)
    sizes = ", ".join(f"{sample.total:,}" for sample in samples)
    caption = (
        "Ranked by what rose from the first steps to the last; hedges are bold. Of the sampled rollouts in "
        f"rollouts.jsonl: {sizes} words."
    )
    return Plot("Words that changed most", caption, f"Of 1,000 words, first to last: {rose}.", data_url(image))


def data_url(image: bytes) -> str:
    """A PNG file as an address that needs no network."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _plot(panel: Panel, record: RunRecord, folder: Path, marks: Sequence[Mark]) -> Plot | None:
    """Draws a panel into its file and for the page; None where the run has no data for it."""
    curves = panel.curves(record)
    if not curves:
        return None
    image = png(panel.draw, curves, panel.unit, marks)
    (folder / f"{panel.name}.png").write_bytes(image)
    caption = f"{panel.caption} {gaps(curves)}".strip()
    return Plot(panel.title, caption, describe(panel.title, curves), data_url(image))


def template(name: str) -> Template:
    """One of this folder's pages."""
    environment = Environment(
        loader=PackageLoader("student_trainer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
