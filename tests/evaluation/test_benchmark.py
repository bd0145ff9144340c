"""Scores of a hand-made corpus, and benchmarks that are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.benchmark import check_subsets, encode_once, score_subsets
from cocoa_pl.evaluation.report import score_table
from cocoa_pl.evaluation.results import Results, mean_score

HISTOGRAMS = ("positive", "hardest_negative")
Make = Callable[..., EvalSubset]
Encode = Callable[..., np.ndarray]

# Angles in degrees. Row 0 hits, row 1 misses, row 2 ties, row 3 has fewer candidates and hits.
ROWS = [
    ("q 0", ["a 5", "b 50", "c 90"]),
    ("q 45", ["a 5", "b 50", "c 90"]),
    ("q 70", ["b 50", "d 90", "e -40"]),
    ("q 80", ["c 90", "a 5"]),
]


def evaluate(encode: Encode, subsets: Sequence[EvalSubset], **names: str) -> Results:
    return score_subsets(encode_once(encode, subsets), subsets, **names)


@pytest.fixture
def corpus(make_subset: Make) -> list[EvalSubset]:
    return [
        make_subset("scene_i2t", ROWS),
        make_subset("scene_vqa", ROWS[:1], group="vqa"),
        make_subset("inverted_i2t", ROWS[:2], in_distribution=False),
    ]


@pytest.fixture
def results(corpus: list[EvalSubset], compass: Encode) -> Results:
    return evaluate(compass, corpus, benchmark="digits", checkpoint="runs/1")


def test_hand_made_corpus_scores_as_counted_by_hand(results: Results) -> None:
    i2t, vqa, inverted = results.subsets
    assert (i2t.precision_at_1, i2t.precision_at_1_strict) == (0.75, 0.5)
    assert (vqa.precision_at_1, inverted.precision_at_1) == (1.0, 0.5)
    assert i2t.chance == pytest.approx((3 / 3 + 1 / 2) / 4)
    assert mean_score(results.means["in_distribution"]) == pytest.approx((0.75 + 1.0) / 2)
    assert mean_score(results.means["out_of_distribution"]) == 0.5


def test_results_json_has_the_public_schema(results: Results, tmp_path: Path) -> None:
    results.write_json(tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
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
    counted = {name: subsets["scene_i2t"].pop(f"{name}_similarities") for name in HISTOGRAMS}
    assert all(len(bins) == 40 and sum(bins) == 4 for bins in counted.values())
    assert subsets["scene_i2t"] == {
        "group": "retrieval",
        "in_distribution": True,
        "precision_at_1": 0.75,
        "precision_at_1_strict": 0.5,
        "num_queries": 4,
        "num_candidates": 5,
        "chance": pytest.approx(0.375),
        "num_queries_without_choice": 0,
    }


def test_queries_that_have_nothing_to_choose_from_are_counted(
    make_subset: Make, compass: Encode
) -> None:
    """Their hits are by construction, also where the answer is named twice."""
    rows = [ROWS[1], ("q 9", ["a 5"]), ("q 8", ["a 5", "a 5"])]
    results = evaluate(compass, [make_subset("one", rows)], benchmark="x", checkpoint="x")
    assert results.to_json()["subsets"]["one"]["num_queries_without_choice"] == 2
    caveat = "2 of 3 queries have a single candidate, which is right whatever the model says"
    assert results.subsets[0].caveat == caveat
    assert score_table(results).caption == f"one: {caveat}"


def test_a_split_without_subsets_is_null_not_nan(make_subset: Make, compass: Encode) -> None:
    only_in = [make_subset("scene_i2t", ROWS)]
    written = evaluate(compass, only_in, benchmark="digits", checkpoint="x").to_json()
    assert written["out_of_distribution"] is None


def test_every_unique_item_is_encoded_once_across_subsets(
    corpus: list[EvalSubset], compass: Encode
) -> None:
    evaluate(compass, corpus, benchmark="digits", checkpoint="x")
    encoded = compass.encoded  # type: ignore[attr-defined]
    assert sorted(encoded) == sorted({text for query, texts in ROWS for text in (query, *texts)})


def test_gallery_shows_hits_and_misses_with_the_positive_marked(results: Results) -> None:
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


def test_gallery_appends_a_positive_that_is_far_down(make_subset: Make, compass: Encode) -> None:
    rows = [("q 0", ["p 90", *(f"n{angle} {angle}" for angle in range(0, 80, 10))])]
    gallery = evaluate(compass, [make_subset("x_i2t", rows)], benchmark="b", checkpoint="c").gallery
    assert [c.rank for c in gallery[0].ranked] == [1, 2, 3, 4, 5, 9]
    assert gallery[0].ranked[-1].is_positive


def test_a_collapsed_model_is_an_error_and_never_100_percent(corpus: list[EvalSubset]) -> None:
    def encode(items: Sequence[Item]) -> np.ndarray:
        return np.tile(np.array([1, 0], dtype=np.float32), (len(items), 1))

    with pytest.raises(UserError, match="scene_i2t queries: all 4 embeddings are the same vector"):
        evaluate(encode, corpus, benchmark="digits", checkpoint="x")


def test_collapsed_candidates_are_an_error_even_with_good_queries(
    make_subset: Make, compass: Encode
) -> None:
    rows = [("q 0", ["a 5", "b 5"]), ("q 90", ["b 5", "a 5"])]
    with pytest.raises(UserError, match=r"x_i2t candidates: all 2 .*collapsed"):
        evaluate(compass, [make_subset("x_i2t", rows)], benchmark="b", checkpoint="c")


def test_a_failing_subset_stops_the_benchmark(corpus: list[EvalSubset]) -> None:
    calls: list[int] = []

    def encode(items: Sequence[Item]) -> np.ndarray:
        calls.append(len(items))
        raise UserError("scene_i2t row 3: image not found")

    with pytest.raises(UserError, match="row 3"):
        evaluate(encode, corpus, benchmark="digits", checkpoint="x")
    assert len(calls) == 1


def test_an_item_that_cannot_be_embedded_is_named_by_its_row(corpus: list[EvalSubset]) -> None:
    subset = corpus[0]
    items = [*subset.queries, *subset.candidates]

    def named(place: int) -> str:
        def encode(_: Sequence[Item]) -> np.ndarray:
            raise UserError("the encoded image is broken", item=place)

        with pytest.raises(UserError, match="the encoded image is broken") as caught:
            evaluate(encode, corpus[:1], benchmark="b", checkpoint="c")
        return str(caught.value)

    assert len({item.key for item in items}) == len(items)
    assert named(1).startswith(f"{subset.row_ids[list(subset.query_index).index(1)]}, query: ")
    last = len(items) - 1 - len(subset.queries)
    row = next(r for r, some in enumerate(subset.candidate_index) if last in some)
    assert named(len(items) - 1).startswith(f"{subset.row_ids[row]}, candidate: ")


def test_double_and_empty_subsets_are_errors(corpus: list[EvalSubset], make_subset: Make) -> None:
    with pytest.raises(UserError, match=r"scene_i2t: .* twice"):
        check_subsets([*corpus, corpus[0]])
    with pytest.raises(UserError, match="no subset"):
        check_subsets([])
    with pytest.raises(UserError, match="scene_t2i: no rows"):
        check_subsets([make_subset("scene_t2i", [])])
    with pytest.raises(UserError, match="x row 0: no candidates"):
        check_subsets([make_subset("x", [("q 1", [])])])
