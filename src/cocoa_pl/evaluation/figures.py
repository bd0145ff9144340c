"""Figures of the report: loss curves, and a map of vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Floats, evenly_spaced, to_float32

MAPPED_ROWS = 160  # of all subsets together
MOST_POINTS = 200  # of a curve
COLUMNS = {"stage": str, "step": float, "name": str, "value": float}  # of metrics.csv

# --- Loss curves -------------------------------------------------------------------------------


class Panel(NamedTuple):
    """All curves of one loss in one stage, e.g. train and validation, over the same axes.

    Attributes:
        curves: label -> its points, step and value.
        left_out: values that are NaN or inf.
    """

    stage: str
    name: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    first_step: float
    last_step: float
    low: float
    high: float
    left_out: int


def read_panels(files: Mapping[str, Path], *, only: str = "") -> list[Panel]:
    """One panel per stage and metric whose name holds "loss", in the files' order.

    metrics.csv is long: a row `stage,step,name,value` per logged number, with names like
    `train/loss_mntp`.

    Args:
        files: metrics.csv of each run, by what its curves are called; `""` for a run alone.
        only: what names begin with.

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
        tables.append(table.assign(curve=f"{run} " + parts[0], metric=parts[2], part=parts[0]))
    rows = pd.concat(tables)
    losses = rows[rows["metric"].str.contains("loss") & rows["part"].str.startswith(only)]
    by_metric = losses.groupby(["stage", "metric"], sort=False)
    return [_panel(str(stage), str(metric), some) for (stage, metric), some in by_metric]


def _panel(stage: str, name: str, rows: pd.DataFrame) -> Panel:
    finite = rows[np.isfinite(rows["value"])]
    curves = {}
    for label, points in finite.groupby("curve", sort=False):
        # At most MOST_POINTS, each the mean of its stretch of steps, placed at its last step.
        stretch = np.arange(len(points)) // math.ceil(len(points) / MOST_POINTS)
        thinned = points.groupby(stretch).agg({"step": "last", "value": "mean"})
        curves[str(label).strip()] = thinned.to_numpy().tolist()
    drawn = [point for points in curves.values() for point in points] or [(0.0, 0.0)]
    steps, values = zip(*drawn, strict=True)
    low, high = min(0.0, *values), max(0.0, *values)
    left_out = len(rows) - len(finite)
    return Panel(stage, name, curves, min(steps), max(steps), low, high, left_out)


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
    found = []
    for row in evenly_spaced(len(subset.query_index), count=max(rows, 1)):
        query, positive = subset.query_index[row], subset.candidate_index[row][0]
        at = to_float32(np.stack([queries[query], candidates[positive]]))  # (2, D)
        items = subset.queries[query], subset.candidates[positive]
        found.append(Mapped(subset.name, subset.row_ids[row], *items, at))
    return found


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
