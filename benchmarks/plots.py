"""Plots of records: ratios with their intervals, and how cost grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.benchmark import SECONDS

Record = Mapping[str, Any]

OURS, PEER, TARGET, INK = "#1b6ca8", "#9a9a9a", "#c44e52", "#333333"
DPI = 110
COLUMNS = 3
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def draw_ratios(records: Sequence[Record], path: Path) -> None:
    """One row a benchmark: the median, its interval, the target."""
    figure = Figure(figsize=(9, 0.9 + 0.38 * len(records)), layout="constrained")
    axes = figure.subplots()
    for row, record in enumerate(records):
        low, high = record["ci"]
        ratio = record["ratio"]
        axes.plot([1, ratio], [row, row], color="#dddddd", linewidth=2, zorder=1)
        axes.plot([low, high], [row, row], color=OURS, linewidth=4, alpha=0.45, zorder=2)
        axes.plot(ratio, row, "o", color=OURS, zorder=3, label="measured" if row == 0 else None)
        axes.annotate(
            f"{ratio:.3g}x",
            (ratio, row),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
        if record["target"] is not None:
            axes.plot(record["target"], row, "|", color=TARGET, markersize=13, markeredgewidth=2)
    axes.plot([], [], "|", color=TARGET, markersize=11, markeredgewidth=2, label="target")
    axes.set_yticks(range(len(records)), [record["title"] for record in records])
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xscale("log")
    largest = max(max(r["ci"][1], r["target"] or 1) for r in records)
    smallest = min(min(r["ci"][0], 1) for r in records)
    left, right = smallest / 1.3, largest * 1.5
    axes.set_xlim(left, right)
    shown = [tick for tick in TICKS if left <= tick <= right]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_xlabel("peer's time over ours (above 1, this project is faster)")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    _plain(axes)
    _save(figure, path)


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """One panel a curve, both axes logarithmic: a slope of one is linear growth."""
    panels = [(record, curve) for record in records for curve in record["curves"]]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (record, curve) in zip(grid, panels, strict=False):
        draw_curve(axes, record["title"], curve)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].legend(frameon=False)
    _save(figure, path)


def draw_curve(axes: Axes, title: str, curve: Mapping[str, Any]) -> None:
    """Both sides over what grows."""
    xs = [point["x"] for point in curve["points"]]
    scale, unit = _unit(curve)
    for side, colour in (("peer", PEER), ("ours", OURS)):
        values = [point[side] / scale for point in curve["points"]]
        axes.plot(xs, values, "o-", color=colour, label=side, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel(curve["x"])
    axes.set_ylabel(unit)
    axes.set_title(_wrapped(title), fontsize=9, color=INK)
    _plain(axes)


def _unit(curve: Mapping[str, Any]) -> tuple[float, str]:
    if curve["quantity"] == SECONDS:
        return 1e-3, "milliseconds"
    name = curve["quantity"].replace("_", " ")
    if name.endswith("bytes"):
        return 2**20, f"{name.removesuffix('bytes')}MiB"
    return (1e9, "GFLOP") if name == "flops" else (1.0, name)


def _wrapped(title: str, width: int = 38) -> str:
    lines = [""]
    for word in title.replace(" x ", "\u00a0x\u00a0").split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="both", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
