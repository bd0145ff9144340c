"""Scores of a hand-made corpus, and benchmarks that are refused."""

import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest

from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.benchmark import check_subsets
from cocoa_pl.evaluation.report import score_table
from cocoa_pl.evaluation.results import Results
from cocoa_pl.evaluation.scoring import metrics

Make = Callable[..., EvalSubset]
Encode = Callable[..., np.ndarray]
Evaluate = Callable[..., Results]

# Angles in degrees. Row 0 hits, row 1 misses, row 2 ties, row 3 has fewer candidates and hits.
ROWS = [
    ("q 0", ["a 5", "b 50", "c 90"]),
    ("q 45", ["a 5", "b 50", "c 90"]),
    ("q 70", ["b 50", "d 90", "e -40"]),
    ("q 80", ["c 90", "a 5"]),
]


@pytest.fixture
def corpus(make_subset: Make) -> list[EvalSubset]:
    return [
        make_subset("scene_i2t", ROWS),
        make_subset("scene_vqa", ROWS[:1], group="vqa"),
        make_subset("inverted_i2t", ROWS[:2], in_distribution=False),
    ]


@pytest.fixture
def results(corpus: list[EvalSubset], evaluate: Evaluate) -> Results:
    return evaluate(corpus)


def test_a_hand_made_corpus_scores_as_counted_by_hand(results: Results) -> None:
    """In the public schema of results.json."""
    written = json.loads(json.dumps(results.to_json()))
    subsets = written.pop("subsets")
    intervals = written.pop("intervals")
    assert intervals.keys() == {"confidence", *written.keys(), "subsets"} - {
        "benchmark",
        "checkpoint",
    }
    assert intervals["subsets"].keys() == subsets.keys()
    assert written == {
        "benchmark": "digits",
        "checkpoint": "runs/1",
        "overall": pytest.approx(0.75),
        "in_distribution": pytest.approx(0.875),
        "out_of_distribution": 0.5,
        "groups": {"retrieval": pytest.approx(0.625), "vqa": 1.0},
    }
    assert list(subsets) == ["scene_i2t", "scene_vqa", "inverted_i2t"]
    assert subsets["inverted_i2t"]["precision_at_1"] == 0.5
    for name in ("positive", "hardest_negative"):
        bins = subsets["scene_i2t"].pop(f"{name}_similarities")
        assert (len(bins), sum(bins)) == (40, 4)
    assert subsets["scene_i2t"] == {
        "group": "retrieval",
        "in_distribution": True,
        "num_queries": 4,
        "num_candidates": 5,
        "chance": pytest.approx((3 / 3 + 1 / 2) / 4),
        "num_queries_without_choice": 0,
        # Row 1 ranks its positive second, row 2 first, level with another.
        **metrics(np.array([1, 2, 1, 1]), np.array([1, 2, 2, 1])),
        "precision_at_1": 0.75,
        "precision_at_1_strict": 0.5,
    }


def test_candidates_that_a_row_names_twice_are_one(make_subset: Make, evaluate: Evaluate) -> None:
    """A guess is right more often than the length of the list says, and a hit by construction is
    one however often its answer is named.
    """
    rows = [("q 45", ["a 5", "b 50", "b 50", "a 5"]), ("q 9", ["a 5"]), ("q 8", ["a 5", "a 5"])]
    results = evaluate([make_subset("one", rows)])
    found = results.to_json()["subsets"]["one"]
    assert found["chance"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert found["ndcg_at_5"] == pytest.approx((1 / np.log2(3) + 1 + 1) / 3)
    assert found["num_queries_without_choice"] == 2
    assert [len(row.ranked) for row in results.gallery] == [2, 1, 1]
    caveat = "2 of 3 queries have a single candidate, which is right whatever the model says"
    assert results.subsets[0].caveat == caveat
    assert str(score_table(results).caption) == f"one: {caveat}"


def test_leading_components_are_scored_as_unit_vectors_of_their_own(
    make_subset: Make, evaluate: Evaluate
) -> None:
    names = [f"t {n}" for n in range(30)]
    random = np.random.default_rng(0)
    vectors = dict(zip(names, random.normal(size=(30, 8)) + 0.5, strict=True))
    rows = [(names[n], [names[(n + 1) % 30], *random.permutation(names)[:3]]) for n in range(30)]
    subsets = [make_subset("x", rows), make_subset("y", rows[:9], in_distribution=False)]

    def encode(items: Sequence[Item], width: int = 8) -> np.ndarray:
        array = np.array([vectors[item.text][:width] for item in items])
        return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)

    results = evaluate(subsets, encode=encode, widths=[2, 4])
    for width in (2, 4):
        alone = evaluate(subsets, encode=partial(encode, width=width))
        cut = [one.widths[str(width)] for one in results.subsets]
        assert cut == [one.precision_at_1 for one in alone.subsets]
        assert cut != [one.precision_at_1 for one in results.subsets]
        assert results.to_json()["widths"][str(width)] == alone.to_json()["overall"]
    vectors |= {name: np.append(1, vector[1:]) for name, vector in vectors.items()}
    with pytest.raises(UserError, match=r"x, 1 components: queries: all 30 .*collapsed"):
        evaluate(subsets, encode=encode, widths=[1])


def test_gallery_shows_hits_and_misses_with_the_positive_marked(
    results: Results, make_subset: Make, evaluate: Evaluate
) -> None:
    rows = {row.row_id: row for row in results.gallery}
    hit, miss = rows["scene_i2t row 0"], rows["scene_i2t row 1"]
    assert hit.hit
    assert [c.item.text for c in hit.ranked] == ["a 5", "b 50", "c 90"]
    assert [c.is_positive for c in hit.ranked] == [True, False, False]
    assert not miss.hit
    assert [(c.item.text, c.is_positive) for c in miss.ranked][:2] == [
        ("b 50", False),
        ("a 5", True),
    ]
    assert not rows["scene_i2t row 2"].hit  # a tie
    far_down = ("q 0", ["p 90", *(f"n{angle} {angle}" for angle in range(0, 80, 10))])
    (row,) = evaluate([make_subset("x_i2t", [far_down])]).gallery
    assert [c.rank for c in row.ranked] == [1, 2, 3, 4, 5, 9]
    assert row.ranked[-1].is_positive


@pytest.mark.parametrize("side", ["queries", "candidates"])
def test_a_collapsed_model_is_an_error_and_never_100_percent(
    side: str, corpus: list[EvalSubset], compass: Encode, evaluate: Evaluate
) -> None:
    def encode(items: Sequence[Item]) -> np.ndarray:
        texts = {item.text for item in getattr(corpus[0], side)}
        rows = compass(items)
        rows[[item.text in texts for item in items]] = [1, 0]
        return rows

    with pytest.raises(UserError, match=f"scene_i2t {side}: all . embeddings are the same vector"):
        evaluate(corpus, encode=encode)


def test_double_and_empty_subsets_are_errors(corpus: list[EvalSubset], make_subset: Make) -> None:
    for subsets, message in (
        ([*corpus, corpus[0]], r"scene_i2t: .* twice"),
        ([], "no subset"),
        ([make_subset("scene_t2i", [])], "scene_t2i: no rows"),
        ([make_subset("x", [("q 1", [])])], "x row 0: no candidates"),
    ):
        with pytest.raises(UserError, match=message):
            check_subsets(subsets)
