"""Figures of the report: loss curves, histograms of similarities, and a map of vectors.

Curves and histograms are drawn as inline SVG of `WIDTH` x `HEIGHT` units, which the page stretches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Floats, evenly_spaced, to_float32

WIDTH, HEIGHT = 300.0, 100.0
EDGES = tuple(round(-1 + 0.05 * number, 2) for number in range(41))  # of cosines
MAPPED_ROWS = 160  # of all subsets together
MOST_POINTS = 200  # of a curve
COLUMNS = {"stage": str, "step": float, "name": str, "value": float}  # of metrics.csv


# --- Loss curves -------------------------------------------------------------------------------


class Curve(NamedTuple):
    """One line of a panel: `points` is the `points` attribute of an SVG polyline."""

    label: str
    points: str
    last: float


class Panel(NamedTuple):
    """All curves of one loss in one stage, e.g. train and validation, over the same axes."""

    stage: str
    name: str
    curves: list[Curve]
    first_step: int
    last_step: int
    low: float
    high: float
    left_out: int  # values that are NaN or inf


def read_panels(files: Mapping[str, Path]) -> list[Panel]:
    """One panel per stage and metric whose name holds "loss", in the files' order.

    metrics.csv is long: a row `stage,step,name,value` per logged number, with names like
    `train/loss_mntp`.

    Args:
        files: metrics.csv of each run, by what its curves are called; `""` for a run alone.

    Raises:
        UserError: if a file lacks a column, or a step or value is not a number.
    """
    tables = []
    for run, path in files.items():
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)[[*COLUMNS]].astype(COLUMNS)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: expected the columns stage,step,name,value with numbers for step and "
                f"value ({error})"
            ) from error
        parts = table.pop("name").str.rpartition("/")
        tables.append(table.assign(curve=f"{run} " + parts[0], metric=parts[2]))
    rows = pd.concat(tables)
    losses = rows[rows["metric"].str.contains("loss")].groupby(["stage", "metric"], sort=False)
    return [_panel(str(stage), str(metric), some) for (stage, metric), some in losses]


def _panel(stage: str, name: str, rows: pd.DataFrame) -> Panel:
    finite = rows[np.isfinite(rows["value"])]
    drawn = {}
    for label, points in finite.groupby("curve", sort=False):
        # At most MOST_POINTS, each the mean of its stretch of steps, placed at its last step.
        stretch = np.arange(len(points)) // math.ceil(len(points) / MOST_POINTS)
        drawn[str(label).strip()] = points.groupby(stretch).agg({"step": "last", "value": "mean"})
    left, right = (finite["step"].min(), finite["step"].max()) if drawn else (0.0, 0.0)
    low = min([0.0, *(points["value"].min() for points in drawn.values())])
    high = max([low, *(points["value"].max() for points in drawn.values())])
    curves = []
    for label, points in drawn.items():
        across = (points["step"] - left) / ((right - left) or 1) * WIDTH
        down = HEIGHT - (points["value"] - low) / ((high - low) or 1) * HEIGHT
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        curves.append(Curve(label, line, float(points["value"].iloc[-1])))
    left_out = len(rows) - len(finite)
    return Panel(stage, name, curves, int(left), int(right), float(low), float(high), left_out)


# --- Similarities ------------------------------------------------------------------------------


def binned(cosines: Floats) -> tuple[int, ...]:
    """Rows of each bin of `EDGES`; what is not finite is in none."""
    finite = cosines[np.isfinite(cosines)]
    counts = np.histogram(np.clip(finite, -1, 1), bins=np.array(EDGES))[0]  # rounding goes past 1
    return tuple(counts.tolist())


def histogram(positive: Sequence[int], hardest: Sequence[int]) -> dict[str, Any]:
    """Two histograms as they are drawn, on one scale: `low` and `high`, the cosines where the bins
    that hold a row begin and end, and by name their bars (left, width, height).
    """
    both = np.array([positive, hardest])
    filled = np.flatnonzero(both.any(axis=0))
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, len(positive) - 1)
    both = both[:, first : last + 1]
    width = WIDTH / both.shape[1]
    bars = [
        [
            (round(place * width, 2), round(width, 2), round(HEIGHT * float(share), 2))
            for place, share in enumerate(counts / max(1, both.max()))
            if share
        ]
        for counts in both
    ]
    return {"low": EDGES[first], "high": EDGES[last + 1], "positive": bars[0], "hardest": bars[1]}


# --- Map ---------------------------------------------------------------------------------------


class Mapped(NamedTuple):
    """A row of the map: `at` has its query and its positive, (2, D) as vectors, (2, 2) as points.

    A point is (right, down), both from 0 to 1.
    """

    subset: str
    row_id: str
    query: Item
    positive: Item
    at: Floats


class Space(NamedTuple):
    """The map, and the share of the variance that each of its axes holds."""

    places: tuple[Mapped, ...]
    shares: tuple[float, float]


def sample(subset: EvalSubset, queries: Floats, candidates: Floats, *, rows: int) -> list[Mapped]:
    """Some rows, at least one, spread evenly over the subset."""
    rows_shown = evenly_spaced(len(subset.query_index), count=max(rows, 1))
    query = subset.query_index[rows_shown]
    positive = np.array([subset.candidate_index[row][0] for row in rows_shown])
    both = to_float32(queries[query]), to_float32(candidates[positive])
    vectors = np.stack(both, axis=1)  # (rows, 2, D)
    return [
        Mapped(subset.name, subset.row_ids[row], subset.queries[q], subset.candidates[p], at)
        for row, q, p, at in zip(rows_shown, query, positive, vectors, strict=True)
    ]


def flattened(mapped: Sequence[Mapped]) -> Space | None:
    """The map; None for points that all lie on one line.

    The two largest principal components: the plane in which the points lie farthest apart, the same
    at every call and without a setting.
    """
    from sklearn.decomposition import PCA  # only a map needs it, and it takes a second to load

    vectors = np.array([one.at for one in mapped], np.float64).reshape(2 * len(mapped), -1)
    if min(vectors.shape) < 2:
        return None
    pca = PCA(2, svd_solver="full")  # its signs do not depend on the order of the rows
    points = pca.fit_transform(vectors)
    if pca.singular_values_[1] < 1e-6:
        return None
    points -= points.min(axis=0)
    points /= points.max(axis=0)
    points[:, 1] = 1 - points[:, 1]
    pairs = zip(mapped, points.reshape(-1, 2, 2), strict=True)
    across, up = pca.explained_variance_ratio_.tolist()
    return Space(tuple(one._replace(at=at) for one, at in pairs), (across, up))
