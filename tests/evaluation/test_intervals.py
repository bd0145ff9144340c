"""Intervals are those of a bootstrap that draws rows, and widen as they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cocoa_pl.evaluation.results import Results, SubsetScore, score_interval

SUBSET = SubsetScore("scene_i2t", "retrieval", True, 0.7, 0.7, 200, 50, 0.02)
OTHER = replace(SUBSET, name="scene_t2i", precision_at_1=0.4, num_queries=1000)


def by_rows(subset: SubsetScore, *, seed: int) -> np.ndarray:
    """The slow twin: rows are drawn one by one."""
    hits = np.arange(subset.num_queries) < round(subset.precision_at_1 * subset.num_queries)
    rng = np.random.default_rng(seed)
    return hits[rng.integers(len(hits), size=(4000, len(hits)))].mean(1)


def test_intervals_are_those_of_drawing_rows() -> None:
    low, high = score_interval([SUBSET])
    expected = np.quantile(by_rows(SUBSET, seed=1), [0.025, 0.975])
    np.testing.assert_allclose([low, high], expected, atol=0.01)
    low, high = score_interval([SUBSET, OTHER])
    both = (by_rows(SUBSET, seed=2) + by_rows(OTHER, seed=3)) / 2
    np.testing.assert_allclose([low, high], np.quantile(both, [0.025, 0.975]), atol=0.006)


def test_more_queries_and_more_subsets_leave_less_room() -> None:
    def width(*subsets: SubsetScore) -> float:
        low, high = score_interval(subsets)
        assert low < high
        return high - low

    assert width(replace(SUBSET, num_queries=3200)) == pytest.approx(width(SUBSET) / 4, rel=0.1)
    four = [replace(SUBSET, name=f"subset {n}") for n in range(4)]
    assert width(*four) == pytest.approx(width(SUBSET) / 2, rel=0.1)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_what_is_always_the_same_has_no_width(score: float) -> None:
    assert score_interval([replace(SUBSET, precision_at_1=score)]) == (score, score)


def test_a_subset_has_the_same_interval_in_any_choice_of_them() -> None:
    whole = Results("b", "c", (SUBSET, OTHER), ()).to_json()["intervals"]
    few = Results("b", "c", (OTHER,), (), is_partial=True).to_json()["intervals"]
    assert few["subsets"]["scene_t2i"] == whole["subsets"]["scene_t2i"]
    assert few["overall"] is None
    assert few["groups"] == {"retrieval": None}
    assert whole["out_of_distribution"] is None
    low, high = whole["overall"]
    assert low < 0.55 < high
    assert whole["confidence"] == 0.95
    assert whole["groups"]["retrieval"] == whole["overall"] == whole["in_distribution"]
