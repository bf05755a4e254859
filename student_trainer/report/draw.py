"""How a plot is drawn: curves on axes, as PNG. Figures are objects of their own; pyplot's global state is not used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from student_trainer.report.alarms import Mark
from student_trainer.report.deciles import Profile
from student_trainer.report.series import Series, running_median, window_of
from student_trainer.report.words import Sample, Word

SIZE_IN = (5.2, 2.9)
"""Width and height in inches."""

DPI = 180
"""Sharp on a screen of two device pixels per CSS pixel, where a plot is about 500 CSS pixels wide."""

MARGINS = {"left": 0.15, "right": 0.985, "bottom": 0.16, "top": 0.84}
"""Of every plot, so that the steps of neighbouring plots line up; the top holds the legend."""

INK, GRID = "#24292f", "#d8dee4"

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart in any colour vision: Okabe and Ito, "Color Universal Design", 2008."""

ALARM = "#b3261e"
"""The lines of alarms; their letters tell them from a curve."""

MARK_GAP = 0.035
"""Letters nearer to each other than this share of the axis stand on two heights."""

MAX_WORD = 24
"""Letters of a word that a plot has room for."""

MAX_MARKED = 40
"""Values of a curve that are marked one by one; more would run into each other."""

LINE_STYLES = ("-", "--", ":", "-.", "-", "--", ":")
"""So that two curves differ by more than colour."""

MARKERS = "osD^vPX"
"""Of runs: their lines may run into each other, and colours are lost on paper."""

NUM_MARKERS = 8
"""Along a curve."""

LEGEND_WIDTH, LEGEND_HANDLE, LEGEND_ROW_IN = 76, 11, 0.17
"""Letters that fit beside each other above a plot, those that a line's sample takes up, and inches a row."""


@dataclass(frozen=True)
class Curve:
    """One metric with its name; `band` is its interval's lower and upper end, at the same steps."""

    label: str
    series: Series
    band: tuple[Series, Series] | None = None


Draw = Callable[[Axes, Sequence[Curve]], None]


def png(draw: Draw, curves: Sequence[Curve], unit: str, marks: Sequence[Mark] = (), *, legend: bool = True) -> bytes:
    """The PNG file of one plot over steps, dark on white; `unit` names the other axis, `marks` are drawn as lines."""
    figure = Figure(figsize=SIZE_IN, dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(**MARGINS)
    axes = figure.add_subplot()
    draw(axes, curves)
    _over_steps(axes, curves, unit)
    _draw_marks(axes, marks)
    if legend:
        figure.legend(loc="upper left", ncols=4, frameon=False, labelcolor=INK, fontsize=8, handlelength=1.4)
    return _file(canvas)


def png_of_runs(curves: Sequence[Curve | None], unit: str, *, smoothed: bool) -> bytes:
    """The PNG file of one metric of several runs, a curve each, told apart by colour, dashes and markers.

    None takes up the place, and so the colour, of a run without the metric.
    """
    drawn = [(index, curve) for index, curve in enumerate(curves) if curve]
    figure, canvas, num_columns = _under_legend([curve.label for _, curve in drawn])
    axes = figure.add_subplot()
    for index, curve in drawn:
        steps, values = curve.series.steps, curve.series.values
        shown = running_median(values, window_of(len(values))) if smoothed else values
        apart = max(1, len(values) // NUM_MARKERS)
        axes.plot(
            steps,
            shown,
            LINE_STYLES[index],
            color=COLORS[index],
            linewidth=1.6,
            marker=MARKERS[index],
            markersize=4.5,
            markevery=(min(index * apart // len(curves), len(values) - 1), apart),
            label=curve.label,
        )
        if curve.band:
            low, high = curve.band
            axes.fill_between(steps, low.values, high.values, color=COLORS[index], alpha=0.12, linewidth=0)
    _over_steps(axes, [curve for _, curve in drawn], unit)
    _legend_above(figure, num_columns)
    return _file(canvas)


def png_of_profiles(profiles: Sequence[Profile | None]) -> bytes:
    """The PNG file of entropies by position in the completion, a curve each; None as in `png_of_runs`."""
    drawn = [(index, profile) for index, profile in enumerate(profiles) if profile]
    figure, canvas, num_columns = _under_legend([profile.label for _, profile in drawn])
    axes = figure.add_subplot()
    for index, profile in drawn:
        tenths = np.arange(1, len(profile.entropy_D) + 1)
        axes.plot(
            tenths,
            profile.entropy_D,
            LINE_STYLES[index],
            color=COLORS[index],
            marker=MARKERS[index],
            markersize=4.5,
            label=profile.label,
        )
    axes.set_xlabel("tenth of the completion", color=INK)
    axes.set_ylabel("nats", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    _dress(axes)
    _legend_above(figure, num_columns)
    return _file(canvas)


def png_of_words(words: Sequence[Word], samples: Sequence[Sample]) -> bytes:
    """Horizontal dumbbells: each word's frequency in the first, the middle and the last steps."""
    figure = Figure(figsize=(SIZE_IN[0] * 2, 0.9 + 0.3 * len(words)), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = np.arange(len(words))[::-1]
    for row, word in zip(rows, words, strict=True):
        axes.plot([min(word.per_thousand), max(word.per_thousand)], [row, row], color=GRID, linewidth=3, zorder=1)
    for index, (sample, marker) in enumerate(zip(samples, "osD", strict=True)):
        label = f"steps {sample.first} to {sample.last}" if sample.first != sample.last else f"step {sample.first}"
        values = [word.per_thousand[index] for word in words]
        axes.plot(values, rows, marker, color=COLORS[index], markersize=6, label=label, zorder=2)
    axes.set_yticks(rows, [f"{word.text[:MAX_WORD]}{' (hedge)' if word.is_hedge else ''}" for word in words])
    for tick, word in zip(axes.get_yticklabels(), words, strict=True):
        tick.set_fontweight("bold" if word.is_hedge else "normal")
    axes.set_xlabel("of 1,000 words", color=INK)
    axes.set_ylim(-0.7, len(words) - 0.3)
    _dress(axes, "x")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, labelcolor=INK, fontsize=9, handletextpad=0.2
    )
    figure.tight_layout()
    return _file(canvas)


def _over_steps(axes: Axes, curves: Sequence[Curve], unit: str) -> None:
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(unit, color=INK)
    last = max(int(curve.series.steps[-1]) for curve in curves)
    pad = 0.5 + 0.02 * last
    axes.set_xlim(-pad, last + pad)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    _dress(axes)


def _dress(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _under_legend(labels: Sequence[str]) -> tuple[Figure, FigureCanvasAgg, int]:
    """A figure with room above its axes for a legend of those labels, and the legend's columns."""
    num_columns = max(1, min(4, LEGEND_WIDTH // (max(map(len, labels)) + LEGEND_HANDLE)))
    legend_in = 0.1 + LEGEND_ROW_IN * -(-len(labels) // num_columns)
    height = SIZE_IN[1] * MARGINS["top"] + legend_in
    figure = Figure(figsize=(SIZE_IN[0], height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    bottom = SIZE_IN[1] * MARGINS["bottom"] / height
    figure.subplots_adjust(**MARGINS | {"bottom": bottom, "top": 1 - legend_in / height})
    return figure, canvas, num_columns


def _legend_above(figure: Figure, num_columns: int) -> None:
    figure.legend(loc="upper left", ncols=num_columns, frameon=False, labelcolor=INK, fontsize=8, handlelength=3)


def _file(canvas: FigureCanvasAgg) -> bytes:
    file = BytesIO()
    canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """A dashed line where a stretch of alarms begins, a tint as long as it lasts, and its letter inside the plot."""
    low, high = axes.get_xlim()
    last_at, height = -np.inf, 0
    for mark in marks:
        if mark.last_step > mark.step:
            axes.axvspan(mark.step, mark.last_step, color=ALARM, alpha=0.08, linewidth=0)
        axes.axvline(mark.step, color=ALARM, linewidth=1, linestyle=(0, (4, 2)))
        height = 1 - height if mark.step - last_at < MARK_GAP * (high - low) else 0
        last_at = mark.step
        axes.annotate(
            mark.letter,
            (mark.step, 0.99 - 0.09 * height),
            xycoords=("data", "axes fraction"),
            xytext=(2, 0),
            textcoords="offset points",
            color=ALARM,
            fontsize=8,
            fontweight="bold",
            va="top",
        )


def draw_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    """A line through the values of each curve, with its interval where it has one."""
    for index, curve in enumerate(curves):
        steps, values, color, style = curve.series.steps, curve.series.values, COLORS[index], LINE_STYLES[index]
        marker = "o" if len(values) <= MAX_MARKED else ""
        axes.plot(steps, values, style, color=color, marker=marker, markersize=4, label=curve.label)
        if curve.band:
            low, high = curve.band
            # The outline keeps the interval of a single evaluation visible.
            axes.fill_between(
                steps, low.values, high.values, color=color, alpha=0.2, linewidth=1, label="95 % interval"
            )


def draw_smoothed(axes: Axes, curves: Sequence[Curve]) -> None:
    """A thin line through each step's value and a thick one through the running median; lines alone of few values."""
    window = window_of(len(curves[0].series))
    if window == 1:
        return draw_lines(axes, curves)
    for index, curve in enumerate(curves):
        steps, values, color, style = curve.series.steps, curve.series.values, COLORS[index], LINE_STYLES[index]
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.45)
        axes.plot(steps, running_median(values, window), style, color=color, linewidth=2, label=curve.label)
    axes.plot([], [], color=INK, linewidth=0.7, label="each step")
    axes.plot([], [], color=INK, linewidth=2, label=f"running median of {window}")
    return None


def draw_stack(axes: Axes, curves: Sequence[Curve]) -> None:
    """Each step as a column of its parts, the first at the bottom; the parts are logged at the same steps."""
    steps = curves[0].series.steps
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    bottom = np.zeros(len(steps))
    for index, curve in enumerate(curves):
        top = bottom + curve.series.values
        axes.stairs(top, edges, baseline=bottom, fill=True, color=COLORS[index], label=curve.label)
        bottom = top
    axes.set_ylim(bottom=0)
