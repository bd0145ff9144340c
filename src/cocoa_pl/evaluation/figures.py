"""Figures of the report: loss curves, histograms of similarities, and a map of vectors.

Curves and histograms are drawn as inline SVG of `WIDTH` x `HEIGHT` units, which the page stretches.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cocoa_pl.data.items import Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Hits
from cocoa_pl.evaluation.vectors import Floats, evenly_spaced, read

if TYPE_CHECKING:
    from cocoa_pl.data.items import EvalSubset

WIDTH, HEIGHT = 300.0, 100.0
EDGES = tuple(round(-1 + 0.05 * number, 2) for number in range(41))  # of cosines
MAPPED_ROWS = 160  # of all subsets together

Point = tuple[float, float]  # step, value


# --- Loss curves -------------------------------------------------------------------------------


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

    metrics.csv is long: a row `stage,step,name,value` per logged number, with names like
    `train/loss_mntp`.

    Args:
        files: metrics.csv of each run, by what its curves are called; `""` for a run alone.

    Raises:
        UserError: if a file lacks a column, or a step or value is not a number.
    """
    series: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for run, path in files.items():
        for (stage, metric), splits in _series(path, word).items():
            of_panel = series.setdefault((stage, metric), {})
            of_panel |= {f"{run} {split}".strip(): points for split, points in splits.items()}
    return [_panel(stage, metric, splits) for (stage, metric), splits in series.items()]


def _series(path: Path, word: str) -> dict[tuple[str, str], dict[str, list[Point]]]:
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


# --- Similarities ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similarities:
    """Rows of each bin of `EDGES`, by the cosine of their query with its positive, and with the
    nearest of its other candidates.
    """

    positive: tuple[int, ...]
    hardest: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Its part of a subset in results.json; bins are of 0.05 from -1 to 1."""
        return {
            "positive_similarities": list(self.positive),
            "hardest_negative_similarities": list(self.hardest),
        }


class Bar(NamedTuple):
    """In the units of the drawing, `WIDTH` x `HEIGHT`."""

    left: float
    width: float
    height: float


@dataclass(frozen=True)
class Histogram:
    """Similarities of positives and of hardest negatives, as bars between two cosines."""

    positive: list[Bar]
    hardest: list[Bar]
    low: float
    high: float


def counted(hits: Hits) -> Similarities:
    """Histograms of a subset; a row without other candidates is in the first alone."""
    return Similarities(_bins(hits.positive), _bins(hits.hardest))


def histogram(similarities: Similarities) -> Histogram:
    """Bars over the bins between the first and the last that hold a row, on one scale."""
    both = np.array([similarities.positive, similarities.hardest])
    filled = np.flatnonzero(both.any(axis=0))
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, len(both[0]) - 1)
    both = both[:, first : last + 1]
    width = WIDTH / both.shape[1]
    bars = [
        [
            Bar(round(place * width, 2), round(width, 2), round(HEIGHT * float(share), 2))
            for place, share in enumerate(counts / max(1, both.max()))
            if share
        ]
        for counts in both
    ]
    return Histogram(bars[0], bars[1], low=EDGES[first], high=EDGES[last + 1])


def _bins(values: Floats) -> tuple[int, ...]:
    finite = values[np.isfinite(values)]
    counts = np.histogram(np.clip(finite, -1, 1), bins=np.array(EDGES))[0]  # rounding goes past 1
    return tuple(int(count) for count in counts)


# --- Map ---------------------------------------------------------------------------------------


class Mapped(NamedTuple):
    """A row that goes into the map."""

    subset: str
    row_id: str
    query: Item
    positive: Item
    vectors: Floats  # (2, D)


@dataclass(frozen=True)
class Place:
    """A row on the map; points are (right, down), both from 0 to 1."""

    subset: str
    row_id: str
    query: Item
    positive: Item
    query_at: tuple[float, float]
    positive_at: tuple[float, float]


@dataclass(frozen=True)
class Space:
    """The map, and the share of the variance that each of its axes holds."""

    places: tuple[Place, ...]
    shares: tuple[float, float]


def sample(subset: EvalSubset, queries: Floats, candidates: Floats, *, rows: int) -> list[Mapped]:
    """Some rows, at least one, spread evenly over the subset."""
    rows_shown = evenly_spaced(len(subset.query_index), count=max(rows, 1))
    query = subset.query_index[rows_shown]
    positive = np.array([subset.candidate_index[row][0] for row in rows_shown])
    vectors = np.stack([read(queries, query), read(candidates, positive)], axis=1)  # (rows, 2, D)
    return [
        Mapped(subset.name, subset.row_ids[row], subset.queries[q], subset.candidates[p], both)
        for row, q, p, both in zip(rows_shown, query, positive, vectors, strict=True)
    ]


def flattened(mapped: Sequence[Mapped]) -> Space | None:
    """The map; None for points that all lie on one line.

    The two largest principal components: the plane in which the points lie farthest apart, the same
    at every call and without a setting.
    """
    if not mapped:
        return None
    vectors = np.concatenate([one.vectors for one in mapped]).astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    if len(lengths) < 2 or lengths[1] < 1e-6:
        return None
    axes = axes[:2]
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])  # or a map could be mirrored
    points = centred @ (axes * signs[:, None]).T
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - low) / np.where(high > low, high - low, 1)
    points[:, 1] = 1 - points[:, 1]
    shares = lengths[:2] ** 2 / (lengths**2).sum()
    places = [
        Place(
            one.subset,
            one.row_id,
            one.query,
            one.positive,
            query_at=(float(points[2 * number, 0]), float(points[2 * number, 1])),
            positive_at=(float(points[2 * number + 1, 0]), float(points[2 * number + 1, 1])),
        )
        for number, one in enumerate(mapped)
    ]
    return Space(tuple(places), (float(shares[0]), float(shares[1])))
