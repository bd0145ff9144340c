"""Facts that the pages state: quoted errors exist, examples are short and run, every module is in
the reference, links lead somewhere.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# What users meet through commands alone.
UNDOCUMENTED = {"planning", "doctor", "cli", "run", "sweep"}


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


def quoted() -> list[str]:
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    return [m[1] for line in lines if (m := re.match(r"\| `([^`]+)` \|", line))]


def test_errors_are_quoted() -> None:
    assert len(quoted()) > 20


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """The log's %-placeholders are holes, too."""
    return [re.sub(r"%[sd]", "\0", text) for text in literals()]


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_error_is_one_of_the_code(message: str, sources: list[str]) -> None:
    fixed = [part.strip() for part in message.split("…") if part.strip()]
    wanted = re.compile(".*".join(map(re.escape, fixed)), re.DOTALL)
    assert any(wanted.search(text) for text in sources), message


@pytest.mark.parametrize("path", sorted((DOCS / "examples").rglob("*.*")), ids=lambda p: p.name)
def test_an_example_is_short_and_shown(path: Path) -> None:
    if "__pycache__" in path.parts:
        return
    assert len(path.read_text().splitlines()) < 40
    shown = f'--8<-- "{path.relative_to(DOCS / "examples")}"'
    assert shown in (DOCS / "extend.md").read_text()


def test_the_reference_names_every_module_once() -> None:
    named = re.findall(
        r"^::: (cocoa_pl\.[\w.]+)$",
        "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md")),
        re.MULTILINE,
    )
    assert len(named) == len(set(named))
    base = ROOT / "src"
    modules = {".".join(p.relative_to(base).with_suffix("").parts) for p in base.rglob("*.py")}
    assert set(named) <= modules
    components = {name.split(".")[1] for name in named}
    top = {name.split(".")[1] for name in modules if name.count(".")} - {"__init__"}
    assert top - components == UNDOCUMENTED


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http", "img/drawn/")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def documented(docstring: str) -> set[str]:
    """Names under `Args:`; `k, v: ...` documents two."""
    section = re.search(r"^Args:\n((?: +.*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    lines = re.findall(r"^    (\w+(?:, \w+)*):", section[1] if section else "", re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def test_documented_arguments_exist() -> None:
    wrong = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = documented(ast.get_docstring(node) or "")
                taken = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
                fields = {
                    ast.unparse(n.target) for n in ast.walk(node) if isinstance(n, ast.AnnAssign)
                }
                wrong += [f"{path}: {name}" for name in sorted(names - taken - fields)]
    assert not wrong
