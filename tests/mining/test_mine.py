"""Which candidates become negatives: by hand, and against a loop over single rows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cocoa_pl import mining
from cocoa_pl.data.items import Item, numbered
from cocoa_pl.mining import choose


def unit(*degrees: float) -> NDArray[np.float32]:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_nearest_wrong_answers_are_chosen_and_near_answers_spared() -> None:
    # The positive is 30 degrees away: cos 0.866, of which 95 % are 0.823, or 34.6 degrees.
    (found,) = choose(unit(0), unit(30, 5, 32, 40, 60, 90), np.array([0]), np.array([0]), 2, 0.95)
    assert found.candidates.tolist() == [3, 4]
    assert found.spared == 2  # 5 and 32 degrees
    assert (found.positive, found.hardest) == pytest.approx(np.cos(np.deg2rad([30, 40])))


def test_a_row_without_candidates_has_no_negative() -> None:
    (found,) = choose(unit(0), unit(10), np.array([0]), np.array([0]), 3, 0.95)
    assert found.candidates.tolist() == []
    assert np.isnan(found.hardest)


def by_rows(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query: NDArray[np.intp],
    positive: NDArray[np.intp],
    number: int,
    share: float,
) -> list[list[int]]:
    """The slow twin."""
    chosen = []
    for row in range(len(query)):
        answers = {positive[other] for other in range(len(query)) if query[other] == query[row]}
        own = float(queries[query[row]] @ candidates[positive[row]])
        limit = min(own, own * share)
        scored = [
            (-float(queries[query[row]] @ candidates[place]), place)
            for place in range(len(candidates))
            if place not in answers and float(queries[query[row]] @ candidates[place]) <= limit
        ]
        chosen.append([place for _, place in sorted(scored)[:number]])
    return chosen


@pytest.mark.parametrize("block", [1, 100, 1 << 25])
def test_blocks_give_what_single_rows_give(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "BLOCK_VALUES", block)
    random = np.random.default_rng(0)
    # Few values, exact in float32, so that there are ties.
    queries, candidates = (random.integers(-2, 3, (n, 4)).astype(np.float32) for n in (20, 30))
    query, positive = random.integers(0, 20, 60), random.integers(0, 30, 60)
    given = (queries, candidates, query, positive, 4, 0.9)
    assert [row.candidates.tolist() for row in choose(*given)] == by_rows(*given)


def test_distinct_items_in_order_of_appearance() -> None:
    items = [Item(text) for text in "abacb"]
    first, place = numbered(items)
    assert first == [items[0], items[1], items[3]]
    assert place == [0, 1, 0, 2, 1]
