"""Facts that the pages state: quoted errors exist, examples are short and run, every room is in
the reference, links lead somewhere.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cocoa_pl.doctor.report import KINDS
from tests.docs.pages import PAGES, ROOT, pattern_of, troubles

DOCS = ROOT / "docs"
# What users meet through commands alone.
UNDOCUMENTED = {"planning", "doctor", "cli", "run", "sweep", "conf"}


def literals() -> list[str]:
    """Every string of the package; what an f-string fills in is a NUL."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """The log's %-placeholders are holes, too; the chat template says what is wrong with a text."""
    template = ROOT / "src/cocoa_pl/data/chat_template.j2"
    return [re.sub(r"%[sd]", "\0", text) for text in [*literals(), template.read_text()]]


@pytest.mark.parametrize("message", [one for _, messages in troubles() for one in messages])
def test_a_quoted_error_is_one_of_the_code(message: str, sources: list[str]) -> None:
    wanted = pattern_of(message)
    assert any(wanted.search(text) for text in sources), message


def test_every_kind_of_error_has_an_entry_and_is_raised() -> None:
    kinds = [kind for kind, _ in troubles() if kind]
    assert sorted(kinds) == sorted(KINDS)
    files = [path for path in (ROOT / "src").rglob("*.py") if path.name != "report.py"]
    code = "".join(path.read_text() for path in files)
    assert [kind for kind in kinds if f'"{kind}"' not in code] == []
    raised = {
        ast.literal_eval(given.value)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.search("UserError$|_tell$", ast.unparse(node.func))
        for given in node.keywords
        if given.arg == "kind" and isinstance(given.value, ast.Constant)
    }
    assert len(raised) > 5
    assert raised <= set(KINDS)


@pytest.mark.parametrize("path", sorted((DOCS / "examples").rglob("*.*")), ids=lambda p: p.name)
def test_an_example_is_short_and_shown(path: Path) -> None:
    if "__pycache__" in path.parts:
        return
    assert len(path.read_text().splitlines()) < 40
    shown = f'--8<-- "{path.relative_to(DOCS / "examples")}"'
    assert shown in (DOCS / "extend.md").read_text()


def test_the_reference_has_every_room_once() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: cocoa_pl\.(\w+)", text, re.MULTILINE)
    files = (ROOT / "src/cocoa_pl").glob("[a-z]*")
    rooms = {file.stem for file in files if file.is_dir() or file.suffix == ".py"}
    assert sorted(named) == sorted(rooms - UNDOCUMENTED)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http", "img/drawn/")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
