"""Loss curves of runs' metrics.csv, as inline SVG.

metrics.csv is long: a row `stage,step,name,value` per logged number, with names like
`train/loss_mntp`.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cocoa_pl.errors import UserError

Point = tuple[float, float]  # step, value

# The drawing's own units; the page stretches it to the panel's width.
WIDTH, HEIGHT = 300.0, 100.0


@dataclass(frozen=True)
class Curve:
    """One line of a panel: `points` is the `points` attribute of an SVG polyline."""

    label: str
    points: str
    last: float


@dataclass(frozen=True)
class Panel:
    """All curves of one loss in one stage, e.g. train and validation, over the same axes."""

    stage: str
    name: str
    curves: tuple[Curve, ...]
    first_step: int
    last_step: int
    low: float
    high: float
    left_out: int  # values that are NaN or inf


def read_panels(files: Mapping[str, Path], *, word: str = "loss") -> list[Panel]:
    """One panel per stage and metric whose name contains `word`, in the files' order.

    Args:
        files: metrics.csv of each run, by what its curves are called; `""` for a run alone.

    Raises:
        UserError: if a file lacks a column, or a step or value is not a number.
    """
    series: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for run, path in files.items():
        for (stage, metric), splits in _read(path, word).items():
            of_panel = series.setdefault((stage, metric), {})
            of_panel |= {f"{run} {split}".strip(): points for split, points in splits.items()}
    return [_panel(stage, metric, splits) for (stage, metric), splits in series.items()]


def _read(path: Path, word: str) -> dict[tuple[str, str], dict[str, list[Point]]]:
    series: dict[tuple[str, str], dict[str, list[Point]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                stage, name = row["stage"], row["name"]
                point = (float(row["step"]), float(row["value"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} line with {row}: expected the columns stage,step,name,value with "
                    "numbers for step and value"
                ) from error
            split, _, metric = name.rpartition("/")
            if word in metric:
                series.setdefault((stage, metric), {}).setdefault(split, []).append(point)
    return series


def _panel(stage: str, name: str, splits: dict[str, list[Point]]) -> Panel:
    kept = {label: [p for p in points if math.isfinite(p[1])] for label, points in splits.items()}
    drawn = {label: _thin(points) for label, points in kept.items()}
    finite = [point for points in drawn.values() for point in points]
    steps = [step for points in kept.values() for step, _ in points] or [0.0]
    low = min([0.0, *(value for _, value in finite)])
    high = max([low, *(value for _, value in finite)])
    box = (min(steps), max(steps), low, high)
    return Panel(
        stage=stage,
        name=name,
        curves=tuple(
            Curve(label, _polyline(points, box), points[-1][1])
            for label, points in drawn.items()
            if points
        ),
        first_step=int(box[0]),
        last_step=int(box[1]),
        low=low,
        high=high,
        left_out=sum(not math.isfinite(value) for points in splits.values() for _, value in points),
    )


def _thin(points: Sequence[Point], most: int = 200) -> list[Point]:
    """At most `most` points, each the mean of its stretch of steps, placed at its last step."""
    size = math.ceil(len(points) / most) or 1
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [(s[-1][0], sum(value for _, value in s) / len(s)) for s in stretches]


def _polyline(points: Sequence[Point], box: tuple[float, float, float, float]) -> str:
    left, right, low, high = box
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    return " ".join(
        f"{(step - left) / wide * WIDTH:.1f},{HEIGHT - (value - low) / tall * HEIGHT:.1f}"
        for step, value in points
    )
