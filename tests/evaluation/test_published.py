"""Published scores are shown beside a whole benchmark, and not beside a part of one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.report import (
    COLUMNS,
    OWN,
    Provenance,
    published_rows,
    published_table,
    write_report,
)
from cocoa_pl.evaluation.results import Results, SubsetScore

CONF = Path(__file__).parents[2] / "conf" / "benchmark"
MORE = dict.fromkeys(COLUMNS.keys() - {"precision_at_1", "precision_at_1_strict", "chance"}, 0.95)
SUBSETS = (
    SubsetScore("A", "classification", True, 0.8, 0.8, 100, 10, 0.1, more=MORE),
    SubsetScore("B", "vqa", False, 0.5, 0.5, 100, 10, 0.1, more=MORE),
    SubsetScore("C", "retrieval", True, 0.6, 0.6, 100, 10, 0.1, more=MORE),
    SubsetScore("D", "grounding", False, 0.9, 0.9, 100, 10, 0.1, more=MORE),
)


def results(subsets: tuple[SubsetScore, ...] = SUBSETS, *, is_partial: bool = False) -> Results:
    return Results("mmeb_v1", "runs/1", subsets, (), is_partial)


def rows(name: str = "mmeb_v1") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((CONF / f"{name}.yaml").read_text())["published"]
    return found


def test_the_runs_own_line_is_last_and_holds_its_means() -> None:
    *others, own = published_rows(results(), rows())
    assert [model for model, _ in others] == [row["model"] for row in rows()]
    assert own == (OWN, pytest.approx((0.8, 0.5, 0.6, 0.9, 0.7, 0.7, 0.7)))
    paper = dict(others)["CoCoA Qwen2-VL 2B"]
    assert paper == pytest.approx((0.63, 0.574, 0.696, 0.858, 0.702, 0.607, 0.66))


def test_published_means_agree_with_their_own_groups() -> None:
    """MMEB has 10, 10, 12 and 4 subsets, 20 of them in distribution: a misprint shows, and one does
    (see the config).
    """
    for row in rows():
        if row["model"] == "VLM2Vec Qwen2-VL 2B":
            mean = (row["in_distribution"] + row["out_of_distribution"]) / 2
            assert mean == pytest.approx(row["overall"])
            continue
        groups = ("classification", "vqa", "retrieval", "grounding")
        by_group = sum(n * row[name] for n, name in zip((10, 10, 12, 4), groups, strict=True)) / 36
        assert by_group == pytest.approx(row["overall"], abs=0.2), row["model"]  # CoCoA 2B: 66.2
        by_split = (20 * row["in_distribution"] + 16 * row["out_of_distribution"]) / 36
        assert by_split == pytest.approx(row["overall"], abs=0.15), row["model"]


def test_only_a_whole_benchmark_by_the_same_rules_stands_beside_others() -> None:
    assert published_rows(results(is_partial=True), rows()) == []
    assert published_rows(results(), rows("mmeb_v2")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vqa": None}, "vqa of X is None"),
        ({"vqa": 0.5 * 1000}, "vqa of X is 500.0, not a percentage"),
        ({"more": 1}, "the row of X must have .*; see more"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        published_rows(results(), [{**rows()[0], "model": "X", **change}])


def test_terminal_and_report_show_the_same(tmp_path: Path) -> None:
    table = published_table(results(), published_rows(results(), rows()))
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "CoCoA Qwen2-VL 2B" in shown
    page = tmp_path / "report.html"
    given: dict[str, Any] = {"title": "t", "date": "d", "provenance": Provenance()}
    write_report(page, results(), **given, published=published_rows(results(), rows()))
    html = page.read_text()
    for text in (OWN, "70.0", "66.0", "60.7", "MoCa Qwen2.5-VL 7B"):
        assert text in shown
        assert text in html
    write_report(page, results(), **given)
    assert "Beside published" not in page.read_text()
