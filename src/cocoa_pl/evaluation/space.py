"""A map of some queries and their positives: their vectors' principal components.

Principal components: the plane in which the points lie farthest apart, the same at every call and
without a setting. Distances in it are those of the vectors, flattened; it says how much is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cocoa_pl.data.items import Item
from cocoa_pl.evaluation.vectors import Floats, evenly_spaced, read

if TYPE_CHECKING:
    from cocoa_pl.data.items import EvalSubset

MAPPED_ROWS = 160  # of all subsets together


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
    """The map; None for points that all lie on one line."""
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
