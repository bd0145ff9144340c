"""The map of a report and its histograms, on vectors whose places are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.evaluation.benchmark import score_subsets
from cocoa_pl.evaluation.figures import EDGES, Mapped, binned, flattened, histogram, sample
from cocoa_pl.evaluation.report import Provenance
from cocoa_pl.evaluation.vectors import encode_once

ALL = ("context", "bottleneck", "target")


def test_the_map_is_the_plane_in_which_points_lie_farthest_apart() -> None:
    """Of points of a plane in 50 dimensions it is that plane, stretched by axis, and never mirrored
    by the order of the rows.
    """

    def mapped(vectors: np.ndarray) -> list[Mapped]:
        items = Item("q"), Item("p")
        return [Mapped("s", "row", *items, pair) for pair in vectors.reshape(-1, 2, 50)]

    random = np.random.default_rng(0)
    flat = random.normal(size=(12, 2)) * [3, 1]
    vectors = flat @ np.linalg.qr(random.normal(size=(50, 2)))[0].T + 7
    space = flattened(mapped(vectors))
    assert space is not None
    assert sum(space.shares) == pytest.approx(1)
    points = np.concatenate([place.at for place in space.places])
    assert points.min(axis=0) == pytest.approx([0, 0])
    assert points.max(axis=0) == pytest.approx([1, 1])
    for axis in (0, 1):  # each axis is an affine function of the plane's points
        design = np.column_stack([flat, np.ones(len(flat))])
        residual = np.linalg.lstsq(design, points[:, axis], rcond=None)[1]
        assert residual == pytest.approx(0, abs=1e-12)
    turned = flattened(mapped(vectors[::-1]))
    assert turned is not None
    np.testing.assert_allclose(points[::-1], [at for one in turned.places for at in one.at])
    line = np.outer(np.arange(6), np.ones(50))
    assert flattened(mapped(line)) is None


def test_rows_are_spread_over_every_subset(
    make_subset: Callable[..., EvalSubset], compass: Callable[..., np.ndarray]
) -> None:
    rows = [(f"q {n}", [f"p {n + 1}", "other 90"]) for n in range(20)]
    subsets = [make_subset(name, rows) for name in ("a", "b")]
    queries, candidates = compass(subsets[0].queries), compass(subsets[0].candidates)
    found = sample(subsets[0], queries, candidates, rows=3)
    assert [one.row_id for one in found] == ["a row 0", "a row 10", "a row 19"]
    for one in found:
        np.testing.assert_array_equal(one.at, compass([one.query, one.positive]))
    assert len(sample(subsets[0], queries, candidates, rows=0)) == 1
    vectors = encode_once(compass, subsets)
    space = score_subsets(vectors, subsets, benchmark="d", checkpoint="c").space
    assert space is not None
    assert [place.subset for place in space.places] == ["a"] * 20 + ["b"] * 20


def test_histograms_count_rows_by_cosine_and_bars_are_those_of_the_filled_bins() -> None:
    positive = binned(np.array([1.0000001, 0.99, 0.52, -1], np.float32))
    assert len(positive) == len(EDGES) - 1 == 40
    bins = {(EDGES[n], count) for n, count in enumerate(positive) if count}
    assert bins == {(0.95, 2), (0.5, 1), (-1.0, 1)}
    hardest = binned(np.array([0.5, np.nan, -np.inf, 0.01], np.float32))
    assert sum(hardest) == 2  # a row with one candidate has no negative
    bars = histogram(positive, hardest)
    assert (bars["low"], bars["high"]) == (-1, 1)
    assert [height for _, _, height in bars["positive"]] == [50, 50, 100]
    assert bars["hardest"] == [(150, 7.5, 50), (225, 7.5, 50)]
    bars = histogram([0, 0, 4, 0, 1, 0], [0, 2, 0, 0, 0, 0])
    assert (bars["low"], bars["high"]) == (EDGES[1], EDGES[5])
    assert bars["positive"] == [(75, 75, 100), (225, 75, 25)]
    assert bars["hardest"] == [(0, 75, 50)]


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
