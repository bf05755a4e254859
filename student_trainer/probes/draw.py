"""How a probe's plot is drawn: panels side by side, as PNG, in the reports' colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from student_trainer.report.draw import COLORS, DPI, GRID, INK, LINE_STYLES, SIZE_IN


@dataclass(frozen=True)
class Line:
    """Values over positions, with their intervals where they have them."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Bar:
    """One value with its interval, where it has one."""

    label: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """Lines, or else bars, with the names of the axes."""

    y_label: str
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    x_label: str = ""


def png(panels: Sequence[Panel]) -> bytes:
    """The PNG file of the panels, dark on white."""
    width, height = SIZE_IN
    figure = Figure(figsize=(width * len(panels), height + 0.5), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _draw_lines(axes, panel.lines) if panel.lines else _draw_bars(axes, panel.bars)
        axes.set_xlabel(panel.x_label or " ", color=INK)
        axes.set_ylabel(panel.y_label, color=INK)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    figure.tight_layout()
    file = BytesIO()
    canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def _draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    for index, line in enumerate(lines):
        color, style = COLORS[index % len(COLORS)], LINE_STYLES[index % len(LINE_STYLES)]
        axes.plot(line.x, line.y, style, color=color, marker="o", markersize=4, label=line.label)
        if line.band:
            axes.fill_between(line.x, *line.band, color=color, alpha=0.15, linewidth=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor=INK, fontsize=8)


def _draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    for index, bar in enumerate(bars):
        axes.bar(index, bar.value if np.isfinite(bar.value) else np.nan, color=COLORS[index % len(COLORS)], width=0.6)
        if bar.interval and not np.isnan(bar.interval).any():
            axes.plot([index, index], bar.interval, color=INK, linewidth=1)
    axes.set_xticks(range(len(bars)), [bar.label for bar in bars], rotation=15, ha="right")
