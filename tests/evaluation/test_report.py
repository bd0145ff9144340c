"""report.html and the score table show what Results hold, and published scores beside a whole
benchmark.
"""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.report import (
    COLUMNS,
    OWN,
    Provenance,
    picture,
    published_rows,
    published_table,
    score_table,
    write_report,
)
from cocoa_pl.evaluation.results import Results, SubsetScore

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> 5'


@pytest.fixture
def results(make_subset: Callable[..., EvalSubset], evaluate: Callable[..., Results]) -> Results:
    rows = [("q 0", [EVIL, "b 50"]), ("q 45", [EVIL, "b 50"]), ("q 60", ["b 50", EVIL])]
    subset = make_subset("scene_i2t", rows)
    buffer = io.BytesIO()
    Image.new("RGB", (56, 28), "red").save(buffer, "png")
    subset.queries[0] = Item(f"{IMAGE_SLOT} what is this? 0", (buffer.getvalue(),))
    vqa = make_subset("scene_vqa", [("q 0", [EVIL])], group="vqa", in_distribution=False)
    return evaluate([subset, vqa], checkpoint="runs/<1>")


@pytest.fixture
def page(results: Results, policies: dict[str, Policy], metrics_csv: Path, tmp_path: Path) -> str:
    write_report(
        tmp_path / "report.html",
        results,
        title="Tiny & small",
        date="2026-01-02",
        provenance=Provenance(
            facts={"attention": "bidirectional", "note": "<b>bold</b>"},
            lineage=[
                {"stage": "contrast", "steps": 7, "batch_size": 4, "lr": 1e-4, "seed": 3}
                | {"policy": "bidirectional", "validation": {"loss": 0.25}}
            ],
            policies={"contrast": policies["bidirectional"]},
            config="seed: 1\nname: <i>x</i>\n",
            metrics_csv=metrics_csv,
        ),
    )
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def printed(table: Table) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Names and attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))  # type: ignore[method-assign]
    parser.feed(page)
    return found


def test_report_holds_the_numbers_of_results_json(page: str, results: Results) -> None:
    written = results.to_json()
    shown = [written["overall"], *written["groups"].values(), written["out_of_distribution"]]
    for name, subset in written["subsets"].items():
        low, high = written["intervals"]["subsets"][name]
        assert f"{100 * low:.1f} to {100 * high:.1f}" in page
        shown += [subset["precision_at_1"], subset["precision_at_1_strict"], subset["chance"]]
        shown += [subset[f"{name}_at_{k}"] for name in ("recall", "ndcg") for k in (5, 10)]
    for score in shown:
        assert f">{100 * score:.1f}<" in page
    assert "3 queries · 2 candidates" in page


def test_report_is_one_file_that_loads_and_runs_nothing_and_all_text_is_escaped(page: str) -> None:
    assert not re.search(r"https?:|url\(|@import", page)
    for tag, attributes in tags(page):
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "default-src 'none'" in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page
    assert "<b>bold" not in page
    assert "runs/&lt;1&gt;" in page
    assert "Tiny &amp; small" in page


def test_hits_are_words_and_images_have_a_text_and_a_size(page: str) -> None:
    assert "✓ Hit" in page
    assert "✗ Miss: the positive is number 2 of 2" in page
    assert page.count('<li class="positive') == len(re.findall("· right", page)) == 4
    images = [attributes for tag, attributes in tags(page) if tag == "img"]
    assert all(image["alt"] for image in images)
    sizes = {(image["width"], image["height"]) for image in images}
    assert sizes == {("168", "84"), ("56", "28")}  # the gallery's, and the map's


def test_what_there_is_nothing_of_is_left_out_and_no_character_that_a_page_may_not_hold_is_in_it(
    results: Results, tmp_path: Path
) -> None:
    bare = replace(results, gallery=(), space=None)
    provenance = Provenance(config="a\0b\x1b[2J\x85\udcff\ufffe\t\n")
    write_report(tmp_path / "r.html", bare, title="t", date="d", provenance=provenance)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for absent in ("gallery", "map", "training"):
        assert f'id="{absent}"' not in page
    assert "<img" not in page
    assert r"a\x00b\x1b[2J\x85\udcff\ufffe" + "\t\n" in page


def test_terminal_and_page_have_every_score_and_means_unless_subsets_are_a_choice(
    results: Results, tmp_path: Path
) -> None:
    path = tmp_path / "r.html"
    texts = []
    for partial in (False, True):
        some = replace(results, is_partial=partial)
        write_report(path, some, title="t", date="d", provenance=Provenance())
        texts += [printed(score_table(some)).lower(), path.read_text().lower()]
    assert ["overall" in text for text in texts] == [True, True, False, False]
    assert ["mean over" in text for text in texts] == [False, True, False, False]
    assert all("scene_i2t" in text for text in texts)
    for word in ("retrieval", "vqa", "in distribution", "66.7", "83.3"):
        assert word in texts[0]


def test_small_pictures_keep_their_pixels_and_large_ones_shrink() -> None:
    small = picture(Image.new("RGB", (28, 56)), box=112, where="x")
    large = picture(Image.new("RGB", (1000, 20)), box=112, where="x")
    assert (small.width, small.height, small.pixelated) == (56, 112, True)
    assert (large.width, large.height, large.pixelated) == (112, 2, False)
    assert large.uri.startswith("data:image/jpeg;base64,")


# --- Beside published scores ---

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


@pytest.mark.parametrize("change", [{"vqa": None}, {"vqa": 500}, {"more": 1}])
def test_a_row_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the row of X must have model and, in percent, classif"):
        published_rows(RESULTS, [{**ROWS[0], "model": "X", **change}])


def test_terminal_and_report_show_the_same(tmp_path: Path) -> None:
    beside = published_rows(RESULTS, ROWS)
    shown = printed(published_table(RESULTS, beside))
    page = tmp_path / "report.html"
    given: dict[str, Any] = {"title": "t", "date": "d", "provenance": Provenance()}
    write_report(page, RESULTS, **given, published=beside)
    html = page.read_text()
    for text in (OWN, "70.0", "66.0", "60.7", "CoCoA Qwen2-VL 2B", "MoCa Qwen2.5-VL 7B"):
        assert text in shown
        assert text in html
    write_report(page, RESULTS, **given)
    assert "Beside published" not in page.read_text()
