"""Means over seeds, labels of configurations, and runs without results."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import read_results
from cocoa_pl.evaluation.summary import read_runs, write_summary


def make_run(folder: Path, overrides: list[str], *, overall: float | None) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if overall is None:
        return
    subset = {"group": "retrieval", "in_distribution": True, "num_queries": 9}
    results = {
        "benchmark": "digits",
        "checkpoint": "x",
        "overall": overall,
        "in_distribution": overall,
        "out_of_distribution": None,
        "groups": {"retrieval": overall},
        "subsets": {"scene_i2t": {**subset, "precision_at_1": overall + 0.1}},
    }
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    runs = [("causal", 1, 0.2), ("causal", 2, 0.4), ("bridge", 1, 0.6), ("bridge", 2, None)]
    for number, (attention, seed, overall) in enumerate(runs):
        overrides = ["model=tiny", f"+attention={attention}", f"seed={seed}", "hydra.verbose=true"]
        make_run(tmp_path / str(number), overrides, overall=overall)
    return tmp_path


def summarised(sweep: Path, *subsets: str) -> str:
    """The summary.md of a sweep."""
    write_summary(sweep, read_runs(sweep, subsets=subsets), subsets=subsets)
    return (sweep / "summary.md").read_text()


def test_a_run_without_results_is_listed_as_missing(sweep: Path) -> None:
    table = write_summary(sweep, read_runs(sweep, subsets=["scene_i2t"]), subsets=["scene_i2t"])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    printed = " ".join(console.export_text().split())
    markdown = (sweep / "summary.md").read_text()
    for text in (printed, markdown):
        assert "1 of 2" in text
        assert "model=tiny attention=bridge seed=2: no results.json in 3" in text
    assert "| causal | 2 | 30.0 ± 14.1 | 30.0 ± 14.1 | 40.0 ± 14.1 |" in markdown
    assert "| bridge | 1 of 2 | 60.0 | 60.0 | 70.0 |" in markdown


def test_summary_csv_holds_means_and_sample_deviations(sweep: Path) -> None:
    summarised(sweep, "scene_i2t")
    causal, bridge = pd.read_csv(sweep / "summary.csv").to_dict("records")
    assert list(causal)[:5] == ["configuration", "runs", "missing", "overall_mean", "overall_std"]
    assert (causal["runs"], bridge["runs"], bridge["missing"]) == (2, 1, 1)
    assert causal["scene_i2t_mean"] == pytest.approx(0.4)
    assert causal["overall_std"] == pytest.approx(0.02**0.5)  # (0.1² + 0.1²) / (2 - 1)
    assert pd.isna(bridge["overall_std"])
    assert (sweep / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_configuration_without_any_result_keeps_its_line(tmp_path: Path) -> None:
    make_run(tmp_path / "0", ["a=1", "seed=1"], overall=0.5)
    make_run(tmp_path / "1", ["a=2", "seed=1"], overall=None)
    make_run(tmp_path / "2", ["a=3", "seed=1"], overall=0.5)
    (tmp_path / "2" / "results.json").write_text("{")
    text = summarised(tmp_path)
    assert "| 2 | 0 of 1 | missing | missing |" in text
    assert "2/results.json is damaged (Expecting property name" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": None}, "'NoneType' object has no attribute"),
        ({"overall": "0.5"}, "not supported between"),
        ({"overall": float("nan")}, "digits has a score that is none"),
        ({"subsets": {"scene_i2t": {"precision_at_1": 0.5}}}, "it lacks 'group'"),
        ({"tasks": {"CIRR": {"main_score": 0.5}}}, "it lacks 'metric'"),
    ],
)
def test_a_damaged_results_json_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_run(tmp_path, [], overall=0.5)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    whole = rf"results\.json is damaged \(.*{re.escape(message)}.*; score the model again"
    with pytest.raises(UserError, match=whole):
        read_results(path)


def test_a_sweep_over_tasks_of_mteb_is_summarised_by_them(tmp_path: Path) -> None:
    for number, score in enumerate((0.5, 0.7)):
        make_run(tmp_path / str(number), [f"seed={number}"], overall=0.5)
        tasks = {"CIRR": {"metric": "ndcg_at_10", "main_score": score}}
        (tmp_path / str(number) / "results.json").write_text(
            json.dumps({"benchmark": "mteb", "checkpoint": "x", "tasks": tasks})
        )
    text = summarised(tmp_path, "scene_i2t")
    assert "| configuration | runs | CIRR |" in text
    assert "| as configured | 2 | 60.0 ± 14.1 |" in text


def test_a_sweep_that_failed_as_a_whole_is_summarised_as_missing(tmp_path: Path) -> None:
    make_run(tmp_path / "0", ["seed=1"], overall=None)
    text = summarised(tmp_path, "scene_i2t")
    assert "| as configured | 0 of 1 | missing | missing |" in text


def test_several_varying_overrides_all_stand_in_the_label(tmp_path: Path) -> None:
    for number, overrides in enumerate([["a=1", "b=1"], ["a=1", "b=2"], ["a=2", "b=2"]]):
        make_run(tmp_path / str(number), overrides, overall=0.5)
    assert re.findall(r"\| (a=\S+ b=\S+)", summarised(tmp_path)) == [
        "a=1, b=1",
        "a=1, b=2",
        "a=2, b=2",
    ]


def test_a_subset_that_a_run_lacks_is_an_error_that_names_the_run(sweep: Path) -> None:
    path = sweep / "0" / "results.json"
    path.write_text(path.read_text().replace("scene_i2t", "scene_t2i"))
    with pytest.raises(UserError, match=r"0/results.json: no score scene_i2t"):
        summarised(sweep, "scene_i2t")


def test_runs_come_in_numeric_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        make_run(tmp_path / str(number), [], overall=0.5)
    assert [run.folder.name for run in read_runs(tmp_path, subsets=[])] == ["1", "9", "10"]


def test_overrides_of_hydra_itself_do_not_tell_runs_apart(tmp_path: Path) -> None:
    words = ["++a.b=[1,2]", "c=x=y", "hydra.verbose=true", "hydra/launcher=x"]
    make_run(tmp_path / "0", words, overall=0.5)
    assert read_runs(tmp_path, subsets=[])[0].overrides == {"a.b": "[1,2]", "c": "x=y"}
