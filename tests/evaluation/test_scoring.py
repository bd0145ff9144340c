"""Scores in blocks against the definition."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from cocoa_pl.evaluation import scoring
from cocoa_pl.evaluation.scoring import TIE, Hits, read, score_rows


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
@pytest.mark.parametrize("rows_at_once", [1, 7, 128])
def test_scores_in_blocks_are_those_of_the_definition(
    rows_at_once: int, block: int, dtype: str, nan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "ROWS", rows_at_once)
    monkeypatch.setattr(scoring, "BLOCK", block)
    for seed in range(4):
        corpus = Corpus(seed, dtype=dtype, nan=nan)
        rows = corpus.rows()
        found = score_rows(
            corpus.queries,
            corpus.candidates,
            query_index=corpus.query_index,
            candidate_index=rows,
        )
        expected = by_definition(corpus.queries, corpus.candidates, corpus.query_index, rows)
        assert_same(found, expected)
        assert 0 < found.strict.sum() < found.official.sum() < len(rows)


@pytest.mark.parametrize("dimensions", [7, 64, 1536])
def test_equal_candidates_tie_whatever_the_matrix_product_rounds(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    queries = unit(rng.normal(size=(50, dimensions)))
    candidates = np.repeat(queries, 3, axis=0)  # three copies of every query's answer
    rows = [np.array([3 * row + copy for copy in (row % 3, (row + 1) % 3)]) for row in range(50)]
    hits = score_rows(queries, candidates, query_index=np.arange(50), candidate_index=rows)
    assert hits.official.all()
    assert not hits.strict.any()


def test_neighbours_are_read_without_a_copy_and_others_in_their_order() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(20, 4))).astype(np.float32)
    neighbours = read(vectors, np.arange(3, 11))
    assert np.shares_memory(neighbours, vectors)
    for rows in (np.arange(3, 11), np.array([7]), np.array([4, 3]), np.array([1, 2, 4])):
        np.testing.assert_array_equal(read(vectors, rows), vectors[rows])
    assert read(vectors, np.empty(0, np.int64)).shape == (0, 4)


def test_memory_is_bounded_by_the_block_and_not_by_the_corpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, width, num_rows, each = 40_000, 64, 400, 200
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(count, width))).astype(np.float16)
    rows = [rng.choice(count, size=each, replace=False) for _ in range(num_rows)]
    block = 1 << 15  # 128 KiB of float32
    monkeypatch.setattr(scoring, "ROWS", 4)
    monkeypatch.setattr(scoring, "BLOCK", block)
    tracemalloc.start()
    score_rows(vectors, vectors, query_index=np.arange(num_rows), candidate_index=rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = count * width * 4
    fixed = 24 * count  # places of candidates, and for each row its hits
    assert peak < fixed + 16 * block * 4 < whole / 2
