"""Lists of candidates that are kept once, against rows that spell them out."""

from __future__ import annotations

import tracemalloc

import numpy as np

from cocoa_pl.data.candidate_rows import CandidateRows, CandidateTable, row_lengths


def spelt_out(rows: CandidateRows) -> list[list[int]]:
    return [row.tolist() for row in rows]


def test_rows_of_the_same_candidates_share_a_list_and_keep_their_positives() -> None:
    given = [np.array(row) for row in ([4, 1, 2], [1, 4, 2], [2, 4, 1], [3, 1], [1, 3])]
    rows = CandidateRows.of(given)
    assert [one.tolist() for one in rows.lists] == [[4, 1, 2], [3, 1]]
    assert spelt_out(rows) == [[4, 1, 2], [1, 4, 2], [2, 4, 1], [3, 1], [1, 3]]


def test_every_row_has_its_own_candidates_with_the_positive_first() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(9, size=size) for size in (1, 2, 5, 5, 12)]
    given = [rng.permutation(lists[number]) for number in rng.integers(5, size=200)]
    rows = CandidateRows.of(given)
    assert len(rows) == 200
    assert len(rows.lists) == 5
    for row, expected in zip(rows, given, strict=True):
        assert row[0] == expected[0]
        assert sorted(row) == sorted(expected)
        assert row.dtype == np.int32
    assert row_lengths(rows).tolist() == row_lengths(given).tolist()


def test_a_candidate_named_twice_is_another_list_than_one_named_once() -> None:
    rows = CandidateRows.of([np.array([0, 1, 0]), np.array([0, 1]), np.array([1, 0, 0])])
    assert spelt_out(rows) == [[0, 1, 0], [0, 1], [1, 0, 0]]
    assert len(rows.lists) == 2


def test_chosen_rows_keep_only_their_lists_and_can_be_renumbered() -> None:
    rows = CandidateRows.of([np.array(row) for row in ([0, 1], [2, 3], [1, 0], [4, 2])])
    chosen = rows.select([2, 3, 0])
    assert spelt_out(chosen) == [[1, 0], [4, 2], [0, 1]]
    assert len(chosen.lists) == 2
    rank = np.array([10, 11, 12, 13, 14], dtype=np.int32)
    assert spelt_out(chosen.renumbered(rank)) == [[11, 10], [14, 12], [10, 11]]


def test_rows_are_a_sequence() -> None:
    rows = CandidateRows.shared(np.array([5, 6, 7], dtype=np.int32), np.array([6, 5, 7]))
    assert [row.tolist() for row in rows[1:]] == [[5, 6, 7], [7, 5, 6]]
    assert rows[-1].tolist() == [7, 5, 6]
    assert len(rows) == 3


def test_an_empty_row_has_no_candidates() -> None:
    rows = CandidateRows.of([np.array([], dtype=np.int32), np.array([1], dtype=np.int32)])
    assert spelt_out(rows) == [[], [1]]


def test_many_rows_over_the_same_classes_cost_a_few_bytes_each() -> None:
    classes, count = np.arange(500, dtype=np.int32), 20_000
    table = CandidateTable()
    tracemalloc.start()
    for start in range(0, count, 1000):
        table.extend(np.roll(classes, -turn) for turn in range(start, start + 1000))
    rows = table.rows()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [int(row[0]) for row in rows[498:503]] == [498, 499, 0, 1, 2]
    assert kept < 60 * count  # spelt out: 2000 bytes a row
    assert peak < 2 * 60 * count
