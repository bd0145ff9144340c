"""The site is built without network, holds what it promises, and opens from the disk."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make docs` itself, in a folder where nothing was built: a broken link or a docstring that
    cannot be read ends it.
    """
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "README.md", "conf", "docs", "mkdocs.yml", "src"):
        (folder / name).symlink_to(ROOT / name)
    installed = f"{sys.prefix}/.installed"
    built = subprocess.run(
        ["make", "docs", f"VENV={sys.prefix}", "--old-file", installed],  # nothing is installed
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder / "site"


def test_every_policy_is_drawn(site: Path) -> None:
    for path in (ROOT / "conf" / "attention").glob("*.yaml"):
        name = f"img/drawn/{path.stem}.png"
        assert (site / name).read_bytes().startswith(b"\x89PNG")
        assert name in (site / "stages.html").read_text()
    assert (site / "img/drawn/masking.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("page", "texts"),
    [
        (
            "reference/embedding",
            ("Embed items.", "truncate_dim", "rows of unit length", "UserError"),
        ),
        ("reference/attention", ("A policy is a 3 x 3 table of data",)),
        ("extend", ("class Colours:", "class NewVLBackbone(QwenVLBackbone):", "name: lookback")),
    ],
)
def test_docstrings_signatures_and_examples_are_shown(
    page: str, texts: tuple[str, ...], site: Path
) -> None:
    shown = re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text())
    assert [text for text in texts if text not in shown] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = path.read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page):
            target = re.search(r'(?:src|href)="([^"]*)"', tag)
            assert target is None or not target[1].startswith(("http", "//")), f"{path}: {tag}"


def test_every_page_opens_without_an_error(site: Path, browser: Any) -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)["nav"]
    pages = re.findall(r"[\w/]+\.md", str(nav))
    assert len(pages) > 20
    browser.get_log("browser")
    for page in pages:
        browser.get((site / page).with_suffix(".html").as_uri())
        assert browser.find_element("css selector", "h1").text
        broken = "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
        assert browser.execute_script(broken) == [], page
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
