"""The page of results holds the numbers of the JSON, and its plots are small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.command import run
from benchmarks.page import account, amount, number, rate, seconds

MAX_BYTES = 250_000


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "cpu.json"
    run(["B3", "--json", str(file), "--size", "test", "--pairs", "2", "--seconds", "0"])
    return file


@pytest.fixture(scope="module")
def page(results: Path) -> Path:
    out = results.parent / "results.md"
    run(["page", str(results), "--out", str(out)])
    return out


def test_the_page_holds_the_numbers_of_the_json(results: Path, page: Path) -> None:
    text, records = page.read_text(), json.loads(results.read_text())["results"]
    assert "**re-creation**" in text
    for record in records:
        (row,) = [line for line in text.splitlines() if f"(`{record['name']}`)" in line]
        assert f"**{number(record['ratio'])}x**" in row
        assert seconds(record["ours"]) in row
        assert seconds(record["peer"]) in row
        assert record["peer_label"] in text
        for name, count in record["counts"].items():
            cells = [
                f"`{record['name']}`",
                name.replace("_", " "),
                amount(count["peer"]),
                amount(count["ours"]),
                f"{number(count['ratio'])}x",
            ]
            assert "| " + " | ".join(cells) + " |" in text
    found = records[0]["environment"]
    assert found["commit"][:10] in text
    assert f"torch {found['torch']}" in text
    assert f"## {found['device']}" in text


def test_plots_are_linked_and_small(page: Path) -> None:
    linked = [
        line.split("](")[1].rstrip(")") for line in page.read_text().splitlines() if "](" in line
    ]
    assert linked == ["img/cpu-ratios.png", "img/cpu-curves.png"]
    for name in linked:
        file = page.parent / name
        assert file.stat().st_size < MAX_BYTES
        with Image.open(file) as picture:
            assert min(picture.size) > 100


def test_one_record_alone_makes_a_page(results: Path, tmp_path: Path) -> None:
    """As `python -m benchmarks NAME --json` writes it; this one has no curve."""
    record = json.loads(results.read_text())["results"][1]
    file = tmp_path / "one.json"
    file.write_text(json.dumps(record))
    run(["page", str(file), "--out", str(tmp_path / "results.md")])
    assert record["title"] in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "img" / "cpu-curves.png").exists()


def test_several_files_become_sections(results: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = json.loads(results.read_text())
    for record in other["results"]:
        record["environment"] |= {"device": "Another machine", "device_type": "cuda"}
    file = tmp_path / "cuda.json"
    file.write_text(json.dumps(other))
    out = tmp_path / "results.md"
    run(["page", str(results), str(file), "--out", str(out)])
    text = out.read_text()
    assert text.count("\n## ") == 2
    assert "## Another machine" in text
    assert (tmp_path / "img" / "cuda-ratios.png").is_file()


def test_a_missed_target_is_reported_with_the_largest_possible_ratio(results: Path) -> None:
    record = json.loads(results.read_text())["results"][0]
    missed = account(record | {"target": 1e9, "floor": 2e-6, "ratio_at_floor": 3.21})
    assert "The target of 1,000,000,000x is not reached" in missed
    assert "takes 2 µs alone: 3.21x would be the most" in missed
    assert "not reached" not in account(record | {"target": 1e-9})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number(12.345), "12.3"),
        (number(1234.5), "1,234"),
        (seconds(2.5), "2.5 s"),
        (seconds(0.0123), "12.3 ms"),
        (seconds(4.56e-5), "45.6 µs"),
        (rate(2.5e12), "2.5 T"),
        (rate(150.0), "150 "),
        (amount(1234567.0), "1.23 M"),
        (amount(123456.0), "123,456"),
        (amount(1.527), "1.53"),
    ],
)
def test_figures_have_three_digits_and_counts_all(found: str, expected: str) -> None:
    assert found == expected
