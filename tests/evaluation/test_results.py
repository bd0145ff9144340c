"""results.json is written and read in one place: by this version, by earlier ones, and of mteb; and
its intervals are those of a bootstrap that draws rows.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import (
    Results,
    SubsetScore,
    TaskScore,
    read_config,
    read_results,
    score_interval,
)

SUBSET = SubsetScore("scene_i2t", "retrieval", True, 0.7, 0.7, 200, 50, 0.02)
OTHER = replace(SUBSET, name="scene_t2i", precision_at_1=0.4, num_queries=1000)
RICH = replace(
    OTHER,
    in_distribution=False,
    num_queries_without_choice=3,
    more={"recall_at_5": 0.8, "ndcg_at_10_strict": 0.5},
    widths={"16": 0.2, "64": 0.3},
    positive_similarities=[0, 4, 6],
    hardest_negative_similarities=[5, 0, 5],
)


@pytest.mark.parametrize(
    "results",
    [
        Results("digits", "runs/1", (replace(SUBSET, widths={"16": 0.4, "64": 0.6}), RICH)),
        Results("mmeb", "no \udcff UTF-8", (replace(RICH, name="\udcff"),), is_partial=True),
    ],
    ids=["whole", "partial"],
)
def test_what_is_written_is_read(results: Results, tmp_path: Path) -> None:
    results.write_json(tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == results


def test_mteb_has_the_same_schema_and_no_means(tmp_path: Path) -> None:
    task = TaskScore("STS", "STS", "cosine_spearman", -0.2)
    results = Results("mteb", "x", (), is_partial=True, tasks=(task,), about={"mteb_version": "2"})
    results.write_json(tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == replace(results, about={})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.keys() == {*Results("b", "c", (SUBSET,)).to_json(), "mteb_version"}
    assert written["subsets"]["STS"].keys() == {"group", "metric", "score"}
    assert (written["overall"], written["mteb_version"]) == (None, "2")


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    content = Results("digits", "runs/1", (SUBSET, OTHER)).to_json()
    del content["intervals"]
    for subset in content["subsets"].values():
        del subset["num_queries_without_choice"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "results.json") == Results("digits", "runs/1", (SUBSET, OTHER))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsets": None}, "'NoneType' object has no attribute"),
        ({"subsets": {"a": {"precision_at_1": 0.5}}}, "it lacks 'group'"),
        ({"subsets": {"a": {**SUBSET.to_json(), "recall_at_5": 2}}}, "a has a"),
        ({"subsets": {"a": {**SUBSET.to_json(), "precision_at_1": "0.5"}}}, "not supported"),
        ({"subsets": {"a": {**SUBSET.to_json(), "chance": float("nan")}}}, "is none"),
        ({"subsets": {"a": {**SUBSET.to_json(), "num_queries": 0}}}, "a has a score that is none"),
        ({"subsets": {"a": {"group": "STS", "metric": "x"}}}, "it lacks 'score'"),
        ({"subsets": {"a": {"metric": "x", "score": float("nan")}}}, "a has a score that is none"),
        ({"benchmark": ...}, "it lacks 'benchmark'"),
        ({"subsets": {}, "tasks": {"STS": {"main_score": 0.5}}}, "it holds no scores"),
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {**Results("digits", "runs/1", (SUBSET,)).to_json(), **change}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value != ...}))
    whole = rf"results\.json is damaged \(.*{re.escape(message)}.*; score the model again"
    with pytest.raises(UserError, match=whole):
        read_results(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_results(path)


@pytest.mark.parametrize("content", ["[1]", "text", "a: [", "a: \x00"])
def test_a_damaged_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        read_config(tmp_path)


# --- Intervals ---


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
    for score in (0.0, 1.0):  # what is always the same has no width
        assert score_interval([replace(SUBSET, precision_at_1=score)]) == (score, score)


def test_a_subset_has_the_same_interval_in_any_choice_of_them() -> None:
    content = Results("b", "c", (SUBSET, OTHER)).to_json()
    whole = content["intervals"]
    few = Results("b", "c", (OTHER,), is_partial=True).to_json()["intervals"]
    assert few["subsets"]["scene_t2i"] == whole["subsets"]["scene_t2i"]
    assert few["overall"] is None
    assert few["groups"] == {"retrieval": None}
    assert whole["out_of_distribution"] is content["out_of_distribution"] is None  # and not NaN
    low, high = whole["overall"]
    assert low < 0.55 < high
    assert whole["confidence"] == 0.95
    assert whole["groups"]["retrieval"] == whole["overall"] == whole["in_distribution"]
