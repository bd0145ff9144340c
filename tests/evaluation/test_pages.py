"""Reports in headless Chromium: their numbers, filters, keys, and how they fit on a screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Item
from cocoa_pl.evaluation import compare
from cocoa_pl.evaluation.report import Provenance, write_report
from cocoa_pl.evaluation.results import Results, SubsetScore

OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
METRICS = "stage,step,name,value\ns,0,train/loss,2\ns,9,train/loss,1\ns,9,val/loss,1\n"
NAMES = ("scene_i2t", "a subset <b>whose</b> [name] is long", "vqa")


@pytest.fixture(scope="module")
def chromium(browser: Any) -> Iterator[Any]:
    """Of the width of a desk's screen, unless a test asks for another."""
    resize(browser, 1280)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def resize(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def results(
    make_subset: Callable[..., EvalSubset],
    evaluate: Callable[..., Results],
    make_image: Callable[..., Image.Image],
) -> Results:
    subsets = []
    for place, name in enumerate(NAMES):
        rows = [
            (f"q {10 * n + place}", [f"p {10 * n + place + 2 * n}", f"w {10 * n + 12}", "x 170"])
            for n in range(8)
        ]
        subset = make_subset(name, rows, group="vqa" if name == "vqa" else "retrieval")
        with_image = f"{IMAGE_SLOT}\nwhat? {30 + place}"
        subset.queries[3] = Item(with_image, (make_image((56, 28), seed=1),))
        subsets.append(subset)
    return evaluate(subsets)


@pytest.fixture
def opened(results: Results, policies: dict[str, Policy], chromium: Any, tmp_path: Path) -> Any:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(METRICS)
    provenance = Provenance(
        facts={"seed": 1},
        policies={"contrast": policies["bidirectional"]},
        config="seed: 1\n" + "long: " + "x" * 300,
        metrics_csv=metrics,
        lineage=[
            {"stage": "s", "steps": 9, "batch_size": 4, "lr": 1e-3, "policy": "all", "seed": 1}
        ],
    )
    path = tmp_path / "report.html"
    write_report(path, results, title="Report", date="today", provenance=provenance)
    chromium.get_log("browser")
    chromium.get(path.as_uri())
    return chromium


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def visible(browser: Any, selector: str) -> int:
    return sum(e.is_displayed() for e in browser.find_elements("css selector", selector))


def assert_fits(browser: Any) -> None:
    for width in (400, 1280):
        resize(browser, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def choose(browser: Any, label: str) -> None:
    for choice in browser.find_elements("css selector", ".choice"):
        if choice.text == label:
            choice.click()
            return
    raise AssertionError(label)


def test_a_subset_and_hits_or_misses_can_be_chosen(opened: Any) -> None:
    assert opened.get_log("browser") == []
    assert visible(opened, "figure[data-subset]") == 3
    everything = visible(opened, ".point")
    choose(opened, "vqa")
    assert texts(opened, "figure[data-subset] figcaption b") == ["", "", "vqa"]
    assert visible(opened, "figure[data-subset]") == 1
    assert visible(opened, "details[data-subset]") == 1
    assert 3 * visible(opened, ".point") == everything == 48
    choose(opened, "all")
    assert visible(opened, "figure[data-subset]") == 3
    opened.execute_script(OPEN_ALL)
    hits, misses = visible(opened, ".verdict.hit"), visible(opened, ".verdict.miss")
    assert hits
    assert misses
    choose(opened, "hits")
    assert (visible(opened, ".verdict.hit"), visible(opened, ".verdict.miss")) == (hits, 0)
    choose(opened, "misses")
    assert (visible(opened, ".verdict.hit"), visible(opened, ".verdict.miss")) == (0, misses)


def test_pointing_at_a_point_shows_its_picture_and_the_page_fits(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    assert visible(opened, ".about") == 0
    choose(opened, NAMES[0])
    label = f"query of {NAMES[0]} row 3"
    point = opened.find_element("css selector", f'.point input[aria-label="{label}"]')
    ActionChains(opened).move_to_element(point).perform()
    assert visible(opened, ".about") == 1
    about = point.find_element("xpath", "following-sibling::*")
    assert about.find_element("css selector", "img").is_displayed()
    assert "what? 30" in about.text
    assert f"query · {NAMES[0]} row 3" in about.text
    opened.execute_script(OPEN_ALL)
    assert_fits(opened)


@pytest.mark.slow
def test_keys_lead_everywhere(opened: Any) -> None:
    """Tab reaches every kind of control; arrows go through choices and points of the map."""
    from selenium.webdriver.common.keys import Keys

    body = opened.find_element("css selector", "body")
    reached = []
    for _ in range(30):
        opened.switch_to.active_element.send_keys(Keys.TAB) if reached else body.send_keys(Keys.TAB)
        active = opened.switch_to.active_element
        reached.append(active.get_attribute("name") or active.tag_name)
        if active.get_attribute("name") == "subset":
            active.send_keys(Keys.ARROW_RIGHT)
            assert visible(opened, "figure[data-subset]") == 1
            opened.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
        if active.get_attribute("name") == "point":
            before = active.get_attribute("aria-label")
            active.send_keys(Keys.ARROW_RIGHT)
            after = opened.switch_to.active_element.get_attribute("aria-label")
            assert after != before
            assert visible(opened, ".about") == 1
    assert {"a", "subset", "point", "verdict", "summary"} <= set(reached)


# --- Several runs ---


def scored(folder: Path, shares: list[float], *, rate: str, seed: int = 0) -> Path:
    subsets = tuple(
        SubsetScore(
            *(name, "vqa" if name == "vqa" else "retrieval", name != "vqa"),
            *(share, share, 400, 9, 0.1),
            widths={"8": share / 2},
        )
        for name, share in zip(NAMES, shares, strict=True)
    )
    folder.mkdir()
    Results("digits", folder.name, subsets).write_json(folder / "results.json")
    stage = "stage:\n  first: {steps: 1, lr: 2}\n" if rate == "0.1" else ""
    (folder / "config.yaml").write_text(
        f"seed: {seed}\noptimization:\n  lr: {rate}\n{stage}names: [a, '<b>']\n"
    )
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "report.html").write_text("its own")
    return folder


@pytest.fixture
def side_by_side(chromium: Any, tmp_path: Path) -> Any:
    first = scored(tmp_path / "first", [0.5, 0.5, 0.9], rate="0.1")
    hostile = "other <b> #1 100% ? \udcff"
    other = scored(tmp_path / hostile, [0.7, 0.52, 0.5], rate="0.2")
    out = tmp_path / "pages" / "comparison.html"
    assert compare.run([str(first), str(other), "--out", str(out)], Console(quiet=True)) == 0
    chromium.get_log("browser")
    chromium.get(out.as_uri())
    return chromium


def test_scores_and_differences_stand_side_by_side_and_rows_can_be_hidden(
    side_by_side: Any,
) -> None:
    rows = texts(side_by_side, "#score-table tr")
    (row,) = [row for row in rows if row.startswith("scene_i2t")]
    reach = 196 * (0.5 * 0.5 / 400 + 0.7 * 0.3 / 400) ** 0.5
    assert f"+20.0 ({20 - reach:+.1f} to {20 + reach:+.1f})" in row
    assert row.startswith("scene_i2t 50.0 70.0")
    colours = {
        e.text.split()[0]: e.get_attribute("class")
        for e in side_by_side.find_elements("css selector", "#score-table tr.subset small")
    }
    assert colours == {"+20.0": "above", "+2.0": "", "-40.0": "below"}
    (shorter,) = texts(side_by_side, "#score-table tr.width th")
    assert shorter == "Overall, first 8 components"
    plot = side_by_side.find_element("css selector", "img.plot")
    assert side_by_side.execute_script("return arguments[0].naturalWidth", plot) > 500
    assert len(side_by_side.find_elements("css selector", "polyline")) == 2  # of training
    (legend,) = texts(side_by_side, ".legend")
    assert "first train 1" in legend
    assert r"other <b> #1 100% ? \udcff train 1" in legend
    assert side_by_side.get_log("browser") == []
    assert_fits(side_by_side)
    assert visible(side_by_side, "#score-table tr.subset") == 3
    choose(side_by_side, "rows that differ")
    assert visible(side_by_side, "#score-table tr.subset") == 2
    choose(side_by_side, "means and groups")
    assert visible(side_by_side, "#score-table tr.subset") == 0
    assert visible(side_by_side, "#score-table tr.group") == 2


def test_configs_that_differ_are_shown_and_names_lead_to_reports(side_by_side: Any) -> None:
    assert texts(side_by_side, ".changed tbody tr") == [
        "optimization.lr 0.1 0.2",
        "stage.first.steps 1 –",  # noqa: RUF001
        "stage.first.lr 2 –",  # noqa: RUF001
    ]
    links = side_by_side.find_elements("css selector", ".headline a")
    assert [link.text for link in links] == ["first", r"other <b> #1 100% ? \udcff"]
    side_by_side.get(links[1].get_attribute("href"))
    assert side_by_side.find_element("css selector", "body").text == "its own"
