"""Several runs on one page: their final figures, the config keys in which they differ, and their curves overlaid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from student_trainer.config import TrainConfig
from student_trainer.report import deciles
from student_trainer.report.deciles import profiles_of
from student_trainer.report.draw import COLORS, Curve, draw_lines, png_of_profiles, png_of_runs
from student_trainer.report.panels import Panel, describe, gaps, other_panels, panels
from student_trainer.report.record import RunRecord, read_run
from student_trainer.report.series import running_median, series_of, window_of
from student_trainer.report.write import DECILES_CAPTION, DECILES_TITLE, Plot, data_url, template

ABSENT = "–"

SMOOTHED = (
    ("Reverse KL, nats a token", "reverse_kl"),
    ("Overlap of the top-K lists", "overlap_ratio"),
    ("Token accuracy", "token_accuracy"),
    ("Entropy, nats", "entropy"),
    ("Completion length, tokens", "length_mean"),
)
"""Figures that are noisy from step to step, by their metric."""

Records = Mapping[str, RunRecord]
"""The runs by name, in the order of their colours."""


@dataclass(frozen=True)
class Line:
    """One row of a table: a value for each run."""

    name: str
    values: tuple[str, ...]


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Writes one page about several runs, finished or not, to `out`, whose folder is made; returns `out`.

    Raises:
        ValueError: a folder is not a run's, has no metrics yet or is given twice; or there are more than 7 runs.
    """
    if len(runs) > len(COLORS):
        raise ValueError(f"{len(runs)} runs: no more than {len(COLORS)} can be told apart in one plot; give fewer")
    records = dict(zip(names_of(runs), map(read_run, runs), strict=True))
    page = template("compare.html.jinja").render(
        names=list(records),
        colors=COLORS,
        figures=final_figures(records),
        differences=differences({name: record.config for name, record in records.items()}),
        groups=_groups(records),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def names_of(runs: Sequence[Path]) -> list[str]:
    """Each run's name: its folder's, with as many of the folders above as tell it from the others.

    Raises:
        ValueError: a run is given twice.
    """
    paths = [run.resolve() for run in runs]
    for path, run in zip(paths, runs, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{run} is given twice: a run is compared with others")
    depths = [
        next(d for d in range(1, len(path.parts) + 1) if [p.parts[-d:] for p in paths].count(path.parts[-d:]) == 1)
        for path in paths
    ]
    return ["/".join(path.parts[-depth:]) for path, depth in zip(paths, depths, strict=True)]


def final_figures(records: Records) -> list[Line]:
    """What the runs have come to; a figure that none has logged is left out."""
    lines = [
        Line("Steps", tuple(f"{record.rows[-1]['step']} of {record.config.steps}" for record in records.values())),
        Line("Held-out accuracy, 95 % interval", tuple(map(_accuracy, records.values()))),
        *(Line(name, tuple(_end(record, key) for record in records.values())) for name, key in SMOOTHED),
        Line("Reward of the rollouts", tuple(_end(record, "reward") for record in records.values())),
        Line("Tokens trained on", tuple(_total(record, "num_tokens") for record in records.values())),
        Line("Median seconds a step", tuple(_median(record, "step_s") for record in records.values())),
        Line("Alarms", tuple(map(_alarms, records.values()))),
    ]
    return [line for line in lines if set(line.values) != {ABSENT}]


def differences(configs: Mapping[str, TrainConfig]) -> list[Line]:
    """The keys whose values differ; `run`, which always does, is left out."""
    tables = [
        dict(_flat(config.model_dump(mode="json", exclude_none=True, by_alias=True))) for config in configs.values()
    ]
    keys = list(dict.fromkeys(key for table in tables for key in table if key != "run"))
    lines = [Line(key, tuple(table.get(key, ABSENT) for table in tables)) for key in keys]
    return [line for line in lines if len(set(line.values)) > 1]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _accuracy(record: RunRecord) -> str:
    rows = [row for row in record.rows if "eval/accuracy" in row]
    if not rows:
        return ABSENT
    last = rows[-1]
    interval = f"{last['eval/accuracy_low']:.1%} to {last['eval/accuracy_high']:.1%}"
    return f"{last['eval/accuracy']:.1%} ({interval}), step {last['step']}"


def _end(record: RunRecord, key: str) -> str:
    values = series_of(record.train_rows, key).values
    return f"{running_median(values, window_of(len(values)))[-1]:.3g}" if len(values) else ABSENT


def _total(record: RunRecord, key: str) -> str:
    return f"{sum(row[key] for row in record.train_rows):,}" if record.train_rows else ABSENT


def _median(record: RunRecord, key: str) -> str:
    values = series_of(record.train_rows, key).values
    return f"{np.median(values):.3g}" if len(values) else ABSENT


def _alarms(record: RunRecord) -> str:
    if not record.alarms:
        return "none"
    first = record.alarms[0]
    return f"{len(record.alarms)}, first at step {first['step']}: {first['signal']}"


def _groups(records: Records) -> dict[str, list[Plot]]:
    """The plots by the title of their group: one for each metric that any of the runs has logged."""
    by_run = {name: panels(record.config) | {"Other": other_panels(record)} for name, record in records.items()}
    titles = dict.fromkeys(title for groups in by_run.values() for title in groups)
    plots = {title: _plots(records, {name: groups[title] for name, groups in by_run.items()}) for title in titles}
    if by_position := _plot_of_deciles(records):
        plots["Health"].append(by_position)
    return {title: group for title, group in plots.items() if group}


def _plots(records: Records, group: Mapping[str, Sequence[Panel]]) -> list[Plot]:
    panels_of_key: dict[str, dict[str, Panel]] = {}
    for name, its_panels in group.items():
        for panel in its_panels:
            for key in panel.metrics:
                panels_of_key.setdefault(key, {})[name] = panel
    plots = [_plot(records, key, its_panels) for key, its_panels in panels_of_key.items()]
    return [plot for plot in plots if plot]


def _plot(records: Records, key: str, panel_of: Mapping[str, Panel]) -> Plot | None:
    """One metric's curves; None where no run has it."""
    curves = {name: _curve(records[name], key, name) for name in records if name in panel_of}
    logged = {name: curve for name, curve in curves.items() if curve}
    if not logged:
        return None
    one = panel_of[next(iter(logged))]
    title = one.title if len(one.metrics) == 1 else f"{one.title}: {one.metrics[key]}"
    # Each run keeps its colour where another has not logged the metric.
    shown = [logged.get(name) for name in records]
    image = png_of_runs(shown, one.unit, smoothed=one.draw is not draw_lines)
    captions = {name: panel_of[name].caption for name in logged}
    caption = one.caption if len(set(captions.values())) == 1 else _by_run(captions)
    curves_shown = list(logged.values())
    return Plot(title, f"{caption} {gaps(curves_shown)}".strip(), describe(title, curves_shown), data_url(image))


def _curve(record: RunRecord, key: str, name: str) -> Curve | None:
    [curve] = Panel(key, key, "", {key: name}, "").curves(record) or [None]
    return curve


def _by_run(captions: Mapping[str, str]) -> str:
    return " ".join(f"{name}: {caption}" for name, caption in captions.items())


def _plot_of_deciles(records: Records) -> Plot | None:
    """The entropy by position at the end of each run; None where none has logged it."""
    last = {name: profiles_of(record.train_rows)[-1:] for name, record in records.items()}
    profiles = {name: replace(found[0], label=name) for name, found in last.items() if found}
    if not profiles:
        return None
    image = png_of_profiles([profiles.get(name) for name in records])
    steps = "; ".join(f"{name}: {profile.steps}" for name, profile in profiles.items())
    words = " ".join(map(deciles.describe, profiles.values()))
    return Plot(DECILES_TITLE, f"{DECILES_CAPTION} {steps}.", f"{DECILES_TITLE}, in nats. {words}", data_url(image))
