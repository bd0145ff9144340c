"""Ranks in blocks against the definition, metrics against second implementations, and embeddings
that are refused.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
)

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation import scoring
from cocoa_pl.evaluation.scoring import (
    CUTS,
    TIE,
    Ranks,
    binned,
    check_embeddings,
    metrics,
    rank_positives,
)


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def by_definition(
    queries: np.ndarray, candidates: np.ndarray, query_index: np.ndarray, rows: Sequence[np.ndarray]
) -> tuple[Ranks, np.ndarray]:
    """The slow twin, one row and one candidate at a time; and MMEB's own `argmax == 0`."""
    found: list[tuple[int, int, float, float]] = []
    argmax = []
    for query, row in zip(query_index, rows, strict=True):
        scores = {c: float((queries[query].astype(float) * candidates[c]).sum()) for c in row}
        argmax.append(int(np.argmax([scores[c] for c in row])) == 0)
        first = scores.pop(row[0])
        others = list(scores.values())
        ahead = sum(not (np.isnan(first) or other <= first) for other in others)
        level = sum(not (first > other + TIE and np.isfinite(first)) for other in others)
        found.append(
            (1 + ahead, 1 + level + (not np.isfinite(first)), first, np.max([-np.inf, *others]))
        )
    columns = zip(*found, strict=True)
    return Ranks(*(np.array(column) for column in columns)), np.array(argmax)


def corpus(
    seed: int, dtype: str, nan: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Queries, candidates, and of each row its query and its candidates.

    Some vectors are equal, some nearly equal and, where asked for, some NaN. Rows are ragged, with
    duplicates, half of them with the query's own answer in front.
    """
    rng = np.random.default_rng(seed)
    candidates = unit(rng.normal(size=(60, 24)))
    candidates[20:30] = candidates[:10]
    candidates[30:40] = unit(candidates[:10] + 3e-7 * rng.normal(size=(10, 24)))
    queries = unit(np.concatenate([candidates[:20], rng.normal(size=(30, 24))]))
    if nan:
        candidates[7], queries[3] = np.nan, np.nan
        candidates[11, 0], candidates[12, 0] = np.inf, -np.inf
    index = rng.integers(50, size=120)
    rows = [rng.integers(60, size=rng.integers(1, 15)) for _ in index]
    for place in range(1, 120, 2):
        rows[place] = np.append(index[place] % 20, rows[place])
    return queries.astype(dtype), candidates.astype(dtype), index, rows


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("nan", [False, True], ids=["finite", "nan"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("rows_at_once", "block"), [(1, 1), (7, 100), (128, 1 << 20)])
def test_ranks_in_blocks_are_those_of_the_definition(
    rows_at_once: int, block: int, dtype: str, nan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "ROWS", rows_at_once)
    monkeypatch.setattr(scoring, "BLOCK", block)
    for seed in range(2):
        queries, candidates, index, rows = corpus(seed, dtype, nan)
        found = rank_positives(queries, candidates, query_index=index, candidate_index=rows)
        expected, argmax = by_definition(queries, candidates, index, rows)
        np.testing.assert_array_equal(found.official, expected.official)
        np.testing.assert_array_equal(found.strict, expected.strict)
        np.testing.assert_allclose(found.positive, expected.positive, atol=1e-5)
        np.testing.assert_allclose(found.hardest, expected.hardest, atol=1e-5)
        np.testing.assert_array_equal(found.official == 1, argmax)
        assert 0 < (found.strict == 1).sum() < argmax.sum() < len(rows)


def test_memory_is_bounded_by_the_block_and_not_by_the_corpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, width, num_rows, each = 40_000, 64, 400, 200
    block = 1 << 15  # 128 KiB of float32
    monkeypatch.setattr(scoring, "BLOCK", block)
    monkeypatch.setattr(scoring, "ROWS", 4)
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(count, width))).astype(np.float16)
    rows = [rng.integers(count, size=each) for _ in range(num_rows)]
    tracemalloc.start()
    rank_positives(vectors, vectors, query_index=np.arange(num_rows), candidate_index=rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = count * width * 4
    fixed = 24 * count  # places of candidates, and for each row its ranks
    assert peak < fixed + 16 * block * 4 < whole / 2


def test_metrics_of_ranks_are_those_of_torchmetrics_on_scores() -> None:
    """Without ties both rules agree, and a second implementation sees the same scores."""
    rng = np.random.default_rng(3)
    queries, candidates = unit(rng.normal(size=(40, 8))), unit(rng.normal(size=(90, 8)))
    rows = [rng.permutation(90)[: rng.integers(2, 60)] for _ in range(40)]
    ranks = rank_positives(queries, candidates, query_index=np.arange(40), candidate_index=rows)
    found = metrics(ranks.official, ranks.strict)
    expected: dict[str, list[float]] = {}
    for query, row in zip(queries, rows, strict=True):
        scores = torch.from_numpy(candidates[row] @ query) + 1  # recall drops what is below zero
        right = torch.arange(len(row)) == 0
        for k in CUTS:
            for name, metric in (
                ("recall", retrieval_recall),
                ("ndcg", retrieval_normalized_dcg),
                ("precision", retrieval_hit_rate),
            ):
                value = float(metric(scores, right, top_k=k))
                expected.setdefault(f"{name}_at_{k}", []).append(value)
    wanted = ["precision_at_1", *(f"{name}_at_{k}" for name in ("recall", "ndcg") for k in CUTS)]
    assert sorted(found) == sorted([*wanted, *(f"{name}_strict" for name in wanted)])
    for name in wanted:
        assert found[name] == pytest.approx(np.mean(expected[name]), abs=1e-6), name
        assert found[f"{name}_strict"] == found[name]
    assert found["recall_at_1"] == found["ndcg_at_1"] == found["precision_at_1"]
    assert 0 < found["ndcg_at_5"] < found["recall_at_5"] < found["recall_at_10"] < 1


def test_a_tie_goes_to_the_positive_and_by_the_strict_rule_against_it() -> None:
    """Three candidates level with the positive, and two above: it is third, or sixth."""
    found = metrics(np.array([3]), np.array([6]))
    assert (found["recall_at_5"], found["recall_at_5_strict"]) == (1, 0)
    assert found["ndcg_at_10"] == pytest.approx(1 / np.log2(4))
    assert found["ndcg_at_10_strict"] == pytest.approx(1 / np.log2(7))


def test_cosines_are_counted_in_forty_bins() -> None:
    counts = binned(np.array([1.0000001, 0.99, 0.52, -1, np.nan, -np.inf], np.float32))
    assert {n: count for n, count in enumerate(counts) if count} == {0: 1, 30: 1, 39: 2}
    assert len(counts) == 40


# --- Embeddings that are refused ---

GOOD = unit(np.random.default_rng(0).normal(size=(1000, 4)))


@pytest.mark.parametrize("row", [0, 499, 999])
def test_broken_embeddings_are_an_error_that_names_them_in_every_block(
    row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "BLOCK", 100)
    for value, message in (
        (np.nan, "NaN or inf"),
        (np.inf, "NaN or inf"),
        (0.0, r"a length other than 1 \(worst 0\)"),
        (3.0, r"a length other than 1 \(worst 6\)"),
    ):
        wrong = GOOD.copy()
        wrong[row] = value
        whole = rf"^i2t queries: 1 of 1000 embeddings \(first: number {row}\) have {message}"
        with pytest.raises(UserError, match=whole):
            check_embeddings(wrong, name="i2t queries")
    same = np.repeat(GOOD[1:2], 1000, axis=0)
    with pytest.raises(UserError, match="all 1000 embeddings are the same vector"):
        check_embeddings(same, name="x")
    same[row] = GOOD[2]
    check_embeddings(same, name="x")


def test_rounding_is_no_break_and_no_cover_for_a_collapse() -> None:
    noise = np.random.default_rng(0).normal(size=(100, 64)) * 1e-6
    for dtype in ("float32", "float16"):
        check_embeddings(GOOD.astype(dtype), name="x")
        with pytest.raises(UserError, match="collapsed"):
            check_embeddings(unit(np.ones((100, 64)) + noise).astype(dtype), name="x")
    check_embeddings(GOOD * np.float32(1.004), name="x")  # as of bfloat16
    check_embeddings(GOOD[:1], name="x")
