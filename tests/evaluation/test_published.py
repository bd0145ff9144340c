"""Published scores are shown beside a whole benchmark, and not beside a part of one."""

from __future__ import annotations

import io
from dataclasses import replace
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
ROWS: list[dict[str, Any]] = yaml.safe_load((CONF / "mmeb_v1.yaml").read_text())["published"]
MORE = dict.fromkeys(COLUMNS.keys() - {"precision_at_1", "precision_at_1_strict", "chance"}, 0.95)
SCORES = (
    ("classification", True, 0.8),
    ("vqa", False, 0.5),
    ("retrieval", True, 0.6),
    ("grounding", False, 0.9),
)
SUBSETS = tuple(
    SubsetScore(group, group, known, score, score, 100, 10, 0.1, more=MORE)
    for group, known, score in SCORES
)
RESULTS = Results("mmeb_v1", "runs/1", SUBSETS)


def test_the_runs_own_line_is_last_and_holds_its_means() -> None:
    """And what is only a part, or was scored by other rules, stands beside nothing."""
    *others, own = published_rows(RESULTS, ROWS)
    assert [model for model, _ in others] == [row["model"] for row in ROWS]
    assert own == (OWN, pytest.approx((0.8, 0.5, 0.6, 0.9, 0.7, 0.7, 0.7)))
    paper = dict(others)["CoCoA Qwen2-VL 2B"]
    assert paper == pytest.approx((0.63, 0.574, 0.696, 0.858, 0.702, 0.607, 0.66))
    assert published_rows(replace(RESULTS, is_partial=True), ROWS) == []
    of_v2 = yaml.safe_load((CONF / "mmeb_v2.yaml").read_text())["published"]
    assert published_rows(RESULTS, of_v2) == []


def test_published_means_agree_with_their_own_groups() -> None:
    """MMEB has 10, 10, 12 and 4 subsets, 20 of them in distribution: a misprint shows, and one does
    (see the config).
    """
    for row in ROWS:
        if row["model"] == "VLM2Vec Qwen2-VL 2B":
            mean = (row["in_distribution"] + row["out_of_distribution"]) / 2
            assert mean == pytest.approx(row["overall"])
            continue
        groups = ("classification", "vqa", "retrieval", "grounding")
        by_group = sum(n * row[name] for n, name in zip((10, 10, 12, 4), groups, strict=True)) / 36
        assert by_group == pytest.approx(row["overall"], abs=0.2), row["model"]  # CoCoA 2B: 66.2
        by_split = (20 * row["in_distribution"] + 16 * row["out_of_distribution"]) / 36
        assert by_split == pytest.approx(row["overall"], abs=0.15), row["model"]


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
        published_rows(RESULTS, [{**ROWS[0], "model": "X", **change}])


def test_terminal_and_report_show_the_same(tmp_path: Path) -> None:
    beside = published_rows(RESULTS, ROWS)
    console = Console(file=io.StringIO(), record=True, width=200)
    console.print(published_table(RESULTS, beside))
    shown = console.export_text()
    page = tmp_path / "report.html"
    given: dict[str, Any] = {"title": "t", "date": "d", "provenance": Provenance()}
    write_report(page, RESULTS, **given, published=beside)
    html = page.read_text()
    for text in (OWN, "70.0", "66.0", "60.7", "CoCoA Qwen2-VL 2B", "MoCa Qwen2.5-VL 7B"):
        assert text in shown
        assert text in html
    write_report(page, RESULTS, **given)
    assert "Beside published" not in page.read_text()
