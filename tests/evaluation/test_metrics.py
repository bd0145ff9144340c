import numpy as np
import pytest

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.metrics import (
    TIE,
    chance_level,
    check_embeddings,
    rule_hits,
    score_rows,
)


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def slow_twin(
    queries: np.ndarray, candidates: np.ndarray, query_index: np.ndarray, rows: list[np.ndarray]
) -> tuple[list[bool], list[bool]]:
    """Both rules as their definitions read, one row and one candidate at a time."""
    official, strict = [], []
    for query, row in zip(query_index, rows, strict=True):
        scores = [sum(map(float, queries[query] * candidates[c])) for c in row]
        official.append(all(scores[0] >= score for score in scores))
        others = [score for score, c in zip(scores, row, strict=True) if c != row[0]]
        strict.append(all(scores[0] > score + TIE for score in others))
    return official, strict


@pytest.mark.parametrize("block_scores", [1, 100, 1 << 20])
def test_blocked_scores_equal_the_slow_twin_on_ragged_rows(block_scores: int) -> None:
    rng = np.random.default_rng(0)
    queries, candidates = unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(30, 8)))
    query_index = rng.integers(40, size=70)
    rows = [rng.permutation(30)[: rng.integers(1, 9)] for _ in range(70)]
    hits = score_rows(
        queries,
        candidates,
        query_index=query_index,
        candidate_index=rows,
        block_scores=block_scores,
    )
    official, strict = slow_twin(queries, candidates, query_index, rows)
    assert hits.official.tolist() == official
    assert hits.strict.tolist() == strict
    assert 0 < sum(official) < 70


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
    ("scores", "official", "strict"),
    [
        ([0.9, 0.5, 0.1], True, True),
        ([0.5, 0.9, 0.1], False, False),
        ([0.9, 0.9, 0.1], True, False),
        ([0.3, 0.3, 0.3], True, False),
        ([np.nan, np.nan, np.nan], True, False),
        ([0.9, np.nan, 0.1], False, False),
        ([np.inf, 0.5, 0.1], True, False),
    ],
    ids=["hit", "miss", "tie", "collapsed", "all nan", "one nan", "inf"],
)
def test_official_rule_is_argmax_zero_and_strict_rule_wants_a_lead(
    scores: list[float], official: bool, strict: bool
) -> None:
    got = rule_hits(np.array([scores]), np.array([[4, 5, 6]]))
    assert (got[0].tolist(), got[1].tolist()) == ([official], [strict])


def test_chance_is_the_mean_over_ragged_rows() -> None:
    assert chance_level([np.arange(2), np.arange(4)]) == pytest.approx(0.375)


GOOD = np.eye(4, dtype=np.float32)


def broken(row: int, value: object) -> np.ndarray:
    embeddings = GOOD.copy()
    embeddings[row] = value
    return embeddings


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (broken(2, np.nan), r"i2t queries: 1 of 4 embeddings \(first: number 2\) have NaN or inf"),
        (broken(1, np.inf), r"first: number 1\) have NaN or inf"),
        (broken(3, 0.0), r"first: number 3\) have a length other than 1 \(worst 0\)"),
        (GOOD * 1.5, r"4 of 4 embeddings .* length other than 1 \(worst 1.5\)"),
        (np.repeat(GOOD[:1], 4, axis=0), "all 4 embeddings are the same vector"),
    ],
    ids=["nan", "inf", "zero", "not unit", "collapsed"],
)
def test_broken_embeddings_are_an_error_that_names_them(
    embeddings: np.ndarray, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_embeddings(embeddings, name="i2t queries")


def test_a_collapse_that_is_not_quite_exact_is_still_one() -> None:
    noise = np.random.default_rng(0).normal(size=(100, 64)) * 1e-6
    with pytest.raises(UserError, match="collapsed"):
        check_embeddings(unit(np.ones((100, 64)) + noise), name="x")


def test_bfloat16_rounding_and_a_single_embedding_pass() -> None:
    check_embeddings(GOOD * np.float32(1.004), name="x")
    check_embeddings(GOOD[:1], name="x")
