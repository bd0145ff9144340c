"""Real tasks through `mteb.evaluate`: scores are those that the vectors give by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
from PIL import Image
from rich.console import Console

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import TaskScore, read_results
from cocoa_pl.evaluation.scoring import metrics, rank_positives
from cocoa_pl.evaluation.vectors import VectorSettings
from cocoa_pl.for_mteb import digits
from cocoa_pl.for_mteb.benchmark import MtebBenchmark

TASKS = [f"cocoa_pl.for_mteb.digits.{name}" for name in ("DigitScenes", "DigitCount")]
VECTORS = VectorSettings(batch_tokens=4096, threads=0)


def benchmark(**changes: Any) -> MtebBenchmark:
    settings: dict[str, Any] = {
        "tasks": TASKS,
        "suite": None,
        "model_name": "me/tiny",
        "instructions": {},
        "training_datasets": "mmeb",
        "license": None,
        "results": None,
        "batch_size": 16,
    }
    return MtebBenchmark(**{**settings, **changes})


class Scored(NamedTuple):
    """What mteb made of the tiny model."""

    tasks: dict[str, TaskScore]
    folder: Path
    output: str


@pytest.fixture(scope="module")
def scored(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scored]:
    before, digits.CACHE_DIR = digits.CACHE_DIR, str(tmp_path_factory.mktemp("digits"))
    folder = tmp_path_factory.mktemp("run")
    console = Console(width=100, record=True, quiet=False)
    results = benchmark().score(embedder, folder, console, path="run", vectors=VECTORS)
    yield Scored({task.name: task for task in results.tasks}, folder, console.export_text())
    digits.CACHE_DIR = before


def test_retrieval_is_scored_on_pictures(scored: Scored, embedder: Embedder) -> None:
    task = digits.DigitScenes()
    task.load_data()
    data: Any = task.dataset["default"]["test"]
    queries = embedder.encode(data["queries"]["text"], instruction="Find the image of")
    pictures: list[Image.Image] = list(data["corpus"]["image"])
    documents = embedder.encode(pictures, instruction="Represent the image")
    right = [int(next(iter(found))[1:]) for found in data["relevant_docs"].values()]
    rows = [np.array([place, *np.delete(np.arange(len(documents)), place)]) for place in right]
    index = np.arange(len(right))
    ranks = rank_positives(queries, documents, query_index=index, candidate_index=rows)
    found = scored.tasks["DigitScenes"]
    assert found.metric == "ndcg_at_10"
    assert found.score == pytest.approx(
        metrics(ranks.official, ranks.strict)["ndcg_at_10"], abs=2e-3
    )


def test_zero_shot_labels_have_no_instruction(scored: Scored, embedder: Embedder) -> None:
    task = digits.DigitCount()
    task.load_data()
    rows: Any = task.dataset["test"]
    pictures = embedder.encode(list(rows["image"]), instruction="How many digits are there?")
    labels = embedder.encode(digits.LABELS)
    accuracy = ((pictures @ labels.T).argmax(axis=1) == np.array(rows["label"])).mean()
    assert scored.tasks["DigitCount"].score == pytest.approx(accuracy, abs=4e-3)


def test_files_and_table_hold_the_same(scored: Scored) -> None:
    read = read_results(scored.folder / "results.json")  # as of any benchmark
    assert {task.name: task for task in read.tasks} == scored.tasks
    assert read.means == {}
    for name, task in scored.tasks.items():
        assert f"{100 * task.score:.1f}" in next(
            line for line in scored.output.splitlines() if name in line
        )
    files = {path.name for path in (scored.folder / "mteb").rglob("*.json")}
    assert {"DigitScenes.json", "DigitCount.json", "model_meta.json"} <= files


def test_results_of_the_same_weights_are_not_computed_again(
    scored: Scored, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = benchmark(results=str(scored.folder / "mteb"))
    monkeypatch.setattr(Embedder, "encode", None)  # calling it would fail
    again = own.score(embedder, tmp_path, Console(quiet=True), path="run", vectors=VECTORS)
    assert {task.name: task for task in again.tasks} == scored.tasks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "either benchmark.tasks"),
        ({"suite": "MIEB(lite)"}, "either benchmark.tasks"),
        ({"model_name": "cocoa"}, "organization/model, not cocoa"),
        ({"tasks": ["NoSuchTask"]}, "NoSuchTask"),
        ({"tasks": ["cocoa_pl.nowhere.Task"]}, "there is no task cocoa_pl.nowhere.Task: No module"),
        ({"tasks": ["cocoa_pl.data.items.Task"]}, "there is no task cocoa_pl.data.items.Task: "),
    ],
)
def test_mistakes_are_reported_before_a_model_is_loaded(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(**changes)


@pytest.mark.slow
def test_a_suite_is_that_of_mteb() -> None:
    tasks = benchmark(tasks=[], suite="MIEB(lite)").tasks
    assert len(tasks) == len(mteb.get_benchmark("MIEB(lite)").tasks) > 40
