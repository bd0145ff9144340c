"""Blocked scores against the scorer that they replaced, which computes every score of a block."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cocoa_pl.evaluation import scoring
from cocoa_pl.evaluation.scoring import TIE, Hits, score_rows
from cocoa_pl.evaluation.vectors import read


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def by_definition(
    queries: np.ndarray, candidates: np.ndarray, query_index: np.ndarray, rows: Sequence[np.ndarray]
) -> Hits:
    """Both rules as their definitions read, one row and one candidate at a time."""
    official, strict, positive, hardest = [], [], [], []
    for query, row in zip(query_index, rows, strict=True):
        scores = [float((queries[query].astype(float) * candidates[c]).sum()) for c in row]
        official.append(int(np.argmax(scores)) == 0)
        others = [score for score, c in zip(scores, row, strict=True) if c != row[0]]
        leads = all(scores[0] > score + TIE for score in others)
        strict.append(leads and bool(np.isfinite(scores[0])))
        positive.append(scores[0])
        hardest.append(np.max([-np.inf, *others]))
    return Hits(np.array(official), np.array(strict), np.array(positive), np.array(hardest))


def every_score(
    queries: np.ndarray, candidates: np.ndarray, query_index: np.ndarray, rows: Sequence[np.ndarray]
) -> Hits:
    """All queries with all candidates, from which each row takes its own; close rows exactly."""

    def rules(scores: np.ndarray, index: np.ndarray) -> tuple[bool, bool]:
        best_other = np.where(index == index[0], -np.inf, scores).max()
        leads = scores[0] > best_other + TIE and np.isfinite(scores[0])
        return int(scores.argmax()) == 0, bool(leads)

    every = queries.astype(np.float32) @ candidates.astype(np.float32).T
    official, strict, positive, hardest = [], [], [], []
    for query, row in zip(query_index, rows, strict=True):
        scores = every[query, row]
        lead = scores[0] - np.where(row == row[0], -np.inf, scores).max()
        if abs(lead) < 1e-5:
            scores = (candidates[row].astype(np.float64) * queries[query]).sum(axis=1)
        hit = rules(scores, row)
        official.append(hit[0])
        strict.append(hit[1])
        positive.append(scores[0])
        hardest.append(np.where(row == row[0], -np.inf, scores).max())
    return Hits(np.array(official), np.array(strict), np.array(positive), np.array(hardest))


def assert_same(found: Hits, expected: Hits) -> None:
    np.testing.assert_array_equal(found.official, expected.official)
    np.testing.assert_array_equal(found.strict, expected.strict)
    np.testing.assert_allclose(found.positive, expected.positive, atol=1e-5)
    np.testing.assert_allclose(found.hardest, expected.hardest, atol=1e-5)


class Corpus:
    """Vectors among which some are equal, some nearly equal and, where asked for, some NaN."""

    def __init__(self, seed: int, *, dtype: str = "float32", nan: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        candidates = unit(rng.normal(size=(60, 24)))
        candidates[20:30] = candidates[:10]
        candidates[30:40] = unit(candidates[:10] + 3e-7 * rng.normal(size=(10, 24)))
        queries = unit(np.concatenate([candidates[:20], rng.normal(size=(30, 24))]))
        if nan:
            candidates[7], queries[3] = np.nan, np.nan
            candidates[11, 0], candidates[12, 0] = np.inf, -np.inf
        self.queries, self.candidates = queries.astype(dtype), candidates.astype(dtype)
        self.query_index = rng.integers(50, size=120)

    def rows(self, count: int = 120) -> list[np.ndarray]:
        """Ragged, with duplicates, half of them with the query's own answer in front."""
        rows = [self.rng.integers(60, size=self.rng.integers(1, 15)) for _ in range(count)]
        return [
            np.append(query % 20, row) if place % 2 else row
            for place, (query, row) in enumerate(zip(self.query_index, rows, strict=True))
        ]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("nan", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("way", ["own", "product", "chosen"])
def test_every_way_of_scoring_equals_every_score(
    way: str, block: int, dtype: str, nan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "chosen":
        monkeypatch.setattr(scoring, "product_counts_less", lambda *_, **__: way == "product")
    for seed in range(4):
        corpus = Corpus(seed, dtype=dtype, nan=nan)
        rows = corpus.rows()
        found = score_rows(
            corpus.queries,
            corpus.candidates,
            query_index=corpus.query_index,
            candidate_index=rows,
            block=block,
        )
        given = (corpus.queries, corpus.candidates, corpus.query_index, rows)
        assert_same(found, every_score(*given))
        assert_same(found, by_definition(*given))
        assert 0 < found.strict.sum() < found.official.sum() < len(rows)


def test_scores_use_only_the_candidates_of_the_row() -> None:
    # The best candidate of all (number 0) is not among this row's candidates.
    queries = unit(np.array([[1.0, 0.0]]))
    candidates = unit(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    hits = score_rows(
        queries, candidates, query_index=np.array([0]), candidate_index=[np.array([1, 2])]
    )
    assert hits.precision_at_1 == 1.0


@pytest.mark.parametrize("dimensions", [7, 64, 1536])
def test_equal_candidates_tie_whatever_the_matrix_product_rounds(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    queries = unit(rng.normal(size=(50, dimensions)))
    candidates = np.repeat(queries, 3, axis=0)  # three copies of every query's answer
    rows = [np.array([3 * row + copy for copy in (row % 3, (row + 1) % 3)]) for row in range(50)]
    hits = score_rows(queries, candidates, query_index=np.arange(50), candidate_index=rows)
    assert hits.precision_at_1 == 1.0
    assert hits.precision_at_1_strict == 0.0


def test_the_positive_listed_twice_does_not_tie_with_itself() -> None:
    queries = unit(np.array([[1.0, 0.1]]))
    candidates = unit(np.array([[1.0, 0.0], [0.0, 1.0]]))
    hits = score_rows(
        queries, candidates, query_index=np.array([0]), candidate_index=[np.array([0, 1, 0])]
    )
    assert hits.precision_at_1_strict == 1.0


@pytest.mark.parametrize(
    ("rows", "pairs", "distinct", "product"),
    [
        (100, 100 * 1000, 1000, True),  # all of a block share their candidates
        (1000, 1000 * 1000, 10_000, True),
        (1000, 1000 * 1000, 100_000, False),
        (1000, 1000 * 1000, 1000 * 1000, False),  # nobody shares any
        (1, 1000, 1000, True),  # the same either way
    ],
)
def test_the_way_that_counts_less_is_taken(
    rows: int, pairs: int, distinct: int, product: bool
) -> None:
    assert scoring.product_counts_less(rows, pairs=pairs, distinct=distinct) == product


class Counted:
    """Vectors that count how many are read, and how many at once."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.read = self.most = 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: object) -> np.ndarray:
        found: np.ndarray = self.array[rows]
        self.read += len(found)
        self.most = max(self.most, len(found))
        return found


def test_a_block_reads_what_it_shares_once_and_nothing_that_it_does_not_need() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(2000, 8)))
    queries = vectors[rng.integers(2000, size=200)]
    shared = [rng.choice(50, size=40, replace=False) for _ in range(200)]
    apart = [rng.choice(2000, size=5, replace=False) for _ in range(200)]
    for rows, most_read in ((shared, 50), (apart, 200 * 5)):
        candidates = Counted(vectors)
        score_rows(queries, candidates, query_index=np.arange(200), candidate_index=rows)
        close = 40  # rows settled one by one read a few again
        assert most_read <= candidates.read <= most_read + close


def test_neighbours_are_read_without_a_copy_and_others_in_their_order() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(20, 4))).astype(np.float32)
    neighbours = read(vectors, np.arange(3, 11))
    assert np.shares_memory(neighbours, vectors)
    for rows in (np.arange(3, 11), np.array([7]), np.array([4, 3]), np.array([1, 2, 4])):
        np.testing.assert_array_equal(read(vectors, rows), vectors[rows])
    assert read(vectors, np.empty(0, np.int64)).shape == (0, 4)


def test_memory_is_bounded_by_the_block_and_not_by_the_corpus(tmp_path: Path) -> None:
    count, width, rows_count, each = 40_000, 64, 400, 200
    rng = np.random.default_rng(0)
    path = tmp_path / "vectors.npy"
    np.save(path, unit(rng.normal(size=(count, width))).astype(np.float16))
    vectors = np.load(path, mmap_mode="c")
    rows = [rng.choice(count, size=each, replace=False).astype(np.int32) for _ in range(rows_count)]
    query_index = np.arange(rows_count)
    block = 1 << 15  # 128 KiB of float32
    tracemalloc.start()
    score_rows(vectors, vectors, query_index=query_index, candidate_index=rows, block=block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = count * width * 4
    fixed = 24 * count  # ranks, and for each row its hits and its place
    assert peak < fixed + 16 * block * 4 < whole / 2
