"""The map of a report and its histograms, on vectors whose places are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.evaluation.benchmark import score_subsets
from cocoa_pl.evaluation.figures import (
    EDGES,
    MAPPED_ROWS,
    Mapped,
    binned,
    flattened,
    histogram,
    sample,
)
from cocoa_pl.evaluation.report import Provenance
from cocoa_pl.evaluation.vectors import encode_once

ALL = ("context", "bottleneck", "target")


def mapped(*vectors: np.ndarray) -> list[Mapped]:
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return [Mapped("s", f"row {n}", Item("q"), Item("p"), np.stack(p)) for n, p in enumerate(pairs)]


def test_distances_in_the_plane_are_kept() -> None:
    """Points of a plane in 50 dimensions: the map is that plane, turned and stretched by axis."""
    random = np.random.default_rng(0)
    flat = random.normal(size=(12, 2)) * [3, 1]
    basis = np.linalg.qr(random.normal(size=(50, 2)))[0]
    space = flattened(mapped(*(flat @ basis.T + 7)))
    assert space is not None
    assert sum(space.shares) == pytest.approx(1)
    points = np.concatenate([place.at for place in space.places])
    assert points.min(axis=0) == pytest.approx([0, 0])
    assert points.max(axis=0) == pytest.approx([1, 1])
    for axis in (0, 1):  # each axis is an affine function of the plane's points
        design = np.column_stack([flat, np.ones(len(flat))])
        residual = np.linalg.lstsq(design, points[:, axis], rcond=None)[1]
        assert residual == pytest.approx(0, abs=1e-12)


def test_the_map_is_never_mirrored() -> None:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(8, 5))
    first, second = (
        flattened(mapped(*vectors)),
        flattened(mapped(*vectors[[2, 3, 0, 1, 6, 7, 4, 5]])),
    )
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first.places[0].at, second.places[1].at, atol=1e-9)


def test_points_on_a_line_make_no_map() -> None:
    line = np.outer(np.arange(6), np.ones(4))
    assert flattened(mapped(*line)) is None
    assert flattened([]) is None


def test_rows_are_spread_over_the_subset(
    make_subset: Callable[..., EvalSubset], compass: Callable[..., np.ndarray]
) -> None:
    subset = make_subset("s", [(f"q {n}", [f"p {n + 1}", "other 90"]) for n in range(20)])
    queries, candidates = compass(subset.queries), compass(subset.candidates)
    found = sample(subset, queries, candidates, rows=3)
    assert [one.row_id for one in found] == ["s row 0", "s row 10", "s row 19"]
    for one in found:
        np.testing.assert_array_equal(one.at, compass([one.query, one.positive]))
    assert len(sample(subset, queries, candidates, rows=0)) == 1
    assert len(sample(subset, queries, candidates, rows=99)) == 20


def test_a_benchmark_maps_all_its_subsets(
    make_subset: Callable[..., EvalSubset], compass: Callable[..., np.ndarray]
) -> None:
    rows = [(f"q {n}", [f"p {n + 1}", "other 90"]) for n in range(50)]
    subsets = [make_subset(name, rows) for name in ("a", "b")]
    vectors = encode_once(compass, subsets)
    space = score_subsets(vectors, subsets, benchmark="d", checkpoint="c").space
    assert space is not None
    assert [place.subset for place in space.places] == ["a"] * 50 + ["b"] * 50
    assert len(space.places) <= MAPPED_ROWS


def test_histograms_count_rows_by_cosine() -> None:
    positive = binned(np.array([1.0000001, 0.99, 0.52, -1], np.float32))
    assert len(positive) == len(EDGES) - 1 == 40
    bins = {(EDGES[n], count) for n, count in enumerate(positive) if count}
    assert bins == {(0.95, 2), (0.5, 1), (-1.0, 1)}
    hardest = binned(np.array([0.5, np.nan, -np.inf, 0.01], np.float32))
    assert sum(hardest) == 2  # a row with one candidate has no negative


def test_bars_are_those_of_the_filled_bins() -> None:
    positive = [0] * 40
    hardest = [0] * 40
    positive[30], positive[33], hardest[29] = 4, 1, 2
    drawn = histogram(positive, hardest)
    assert (drawn["low"], drawn["high"]) == (0.45, 0.7)
    assert drawn["positive"] == [(60, 60, 100), (240, 60, 25)]
    assert drawn["hardest"] == [(0, 60, 50)]


def test_grids_show_each_policy_once_and_who_uses_it() -> None:
    bidirectional = Policy("both ways", ALL, ALL, ALL, causal=False)
    bridge = Policy(
        "bridge", ("context", "bottleneck"), ALL, ("bottleneck", "target"), causal=False
    )
    causal = Policy("causal", ALL, ALL, ALL, causal=True)
    policies = {"a": bidirectional, "b": bridge, "c": bidirectional, "d": causal}
    assert Provenance(policies=policies).grids == {
        "both ways: a, c": ("AAAAEBBB",) * 8,
        "bridge: b": (*("AAAAE   ",) * 4, "AAAAEBBB", *("    EBBB",) * 3),
        "causal: d": tuple("AAAAEBBB"[: n + 1].ljust(8) for n in range(8)),
    }
