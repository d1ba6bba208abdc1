"""Two kinds of plots as SVG files: lines and grouped bars. Needs matplotlib, so it is imported only for ``--plot``.

Drawing the same figures again gives the same bytes: no date, no version and no random identifier is in a file, so that
a committed plot changes only with what it shows. Text stays text. The colours are those of Okabe and Ito, which can be
told apart with any colour vision, and each line has a marker and dashes of its own besides; the background is white,
for readers with a dark page.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (matplotlib leaves the types of its keyword arguments open)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_STYLE: Any = {  # its keys are a list of literals that differs between versions
    "svg.hashsalt": "pgconductor",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


def lines(
    path: Path,
    *,
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw each series as a line through its points, in their order, and write `path`. `x` and `y` name the axes."""
    with rc_context(_STYLE):
        figure, axes = _page(title, y)
        axes.set_xlabel(x)
        if log_x:
            axes.set_xscale("log")
            # The values that were measured, instead of powers of ten.
            axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
            axes.xaxis.set_major_formatter(FuncFormatter(_number))
            axes.xaxis.set_minor_locator(NullLocator())
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0, top=1.05 * max((at for points in series.values() for _, at in points), default=1))
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False)
        for (label, points), (colour, marker, dashes) in zip(series.items(), looks, strict=False):
            axes.plot(
                [point[0] for point in points], [point[1] for point in points], label=label, color=colour,
                marker=marker, linestyle=dashes,
            )  # fmt: skip
        _finish(path, figure, axes, len(series))


def bars(path: Path, *, title: str, y: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw for each group a bar of each series, with its value above it, and write `path`.

    A series that a group lacks leaves a gap.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    with rc_context(_STYLE):
        figure, axes = _page(title, y)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        for index, (name, colour) in enumerate(zip(names, cycle(_COLOURS), strict=False)):
            places = [
                (place + (index - (len(names) - 1) / 2) * width, group[name])
                for place, group in enumerate(groups.values())
                if name in group
            ]
            drawn = axes.bar([at for at, _ in places], [value for _, value in places], width, label=name, color=colour)
            size = 9 if len(groups) * len(names) <= 16 else 6
            axes.bar_label(drawn, [_number(value) for _, value in places], fontsize=size, padding=2)
        is_crowded = len(groups) > 8
        room = 18 if is_crowded else max(8, 80 // max(1, len(groups)))  # characters
        axes.set_xticks(range(len(groups)), [fill(name, room, break_long_words=False) for name in groups], fontsize=10)
        if is_crowded:
            axes.tick_params(axis="x", labelrotation=40)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        _finish(path, figure, axes, len(names))


def _page(title: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_ylabel(y)
    return figure, axes


def _finish(path: Path, figure: Figure, axes: Axes, series: int) -> None:
    if series > 1:
        _, labels = axes.get_legend_handles_labels()
        columns = max(1, min(3, 70 // (max(map(len, labels)) + 6)))  # as many as fit
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)  # never on what is drawn
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def _number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
