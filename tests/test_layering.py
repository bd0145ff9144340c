"""The house rules that a syntax tree shows and ruff has no rule for: imports go one way, and
nothing branches on a model's or a stage's name.

Each rule takes a module's place and syntax tree and returns its violations. It is run over the
whole package, and over snippets that must and must not be reported: a rule that has gone blind
fails.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "cocoa_pl"

# Lowest first. A module imports from its own room and from lower layers, never from another room
# of its layer. "" is the package itself, of which users import.
LAYERS = (
    ("errors", "losses", "grad_cache"),
    ("config.bounds", "attention", "distributed"),
    ("data",),
    ("models",),
    ("embedder", "stages"),
    ("", "evaluation", "search"),
    ("config", "doctor", "export", "for_mteb"),
    ("run", "cli", "sweep"),
    ("planning", "mining"),
    ("*.command",),
)
RANKS = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
FORBIDDEN = {("evaluation", "models")}  # it never sees a model, only what encodes


def modules() -> dict[str, ast.Module]:
    """Every module by its place in the package: `data.mmeb` for `cocoa_pl/data/mmeb.py`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        place = file.parent if file.name == "__init__.py" else file.with_suffix("")
        found[".".join(place.relative_to(PACKAGE).parts)] = ast.parse(file.read_text())
    return found


MODULES = modules()

# ---- imports ----


def room_of(place: str) -> str | None:
    """The room of LAYERS that says the most of a module's place."""
    fit = [r for r in RANKS if fnmatchcase(place, r) or fnmatchcase(place, f"{r}.*")]
    return max(fit, key=lambda room: room.count("."), default=None)


def imported(tree: ast.Module) -> Iterator[str]:
    """Places of the package that are imported, in functions and for type checking too. Relative
    imports are not known: ruff bans them.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("cocoa_pl.") for name in names if "cocoa_pl." in name)


def wrong_imports(place: str, tree: ast.Module) -> list[str]:
    own = room_of(place)
    if own is None:
        return [f"{place} has no place in LAYERS; give it one"]
    wrong = []
    for name in imported(tree):
        room = room_of(name)
        if room is None:
            wrong.append(f"{place} imports {name}, which has no place in LAYERS")
        elif room != own and (RANKS[room] >= RANKS[own] or (own, room) in FORBIDDEN):
            wrong.append(f"{place} must not import {name}")
    return wrong


def test_imports_go_one_way() -> None:
    assert {"", "errors", "attention.policy", "data.batch", "models"} <= MODULES.keys()
    assert [wrong for place, tree in MODULES.items() for wrong in wrong_imports(place, tree)] == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("data.mmeb", "from cocoa_pl.models import heads"),
        ("data.mmeb", "def f() -> None:\n    import cocoa_pl.evaluation"),
        ("evaluation.report", "from cocoa_pl import models"),
        ("evaluation.report", "from cocoa_pl.search.index import x"),
        ("evaluation.report", "from cocoa_pl.newcomer import x"),
        ("attention.policy", "from cocoa_pl.attention.command import run"),
        ("newcomer", "x = 1"),
        ("", "from cocoa_pl.config.build import build"),
    ],
)
def test_a_wrong_import_is_reported(place: str, source: str) -> None:
    assert len(wrong_imports(place, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("data.mmeb", "from cocoa_pl.data.batch import Batch"),
        ("stages.recipe", "import torch\nfrom cocoa_pl import models"),
        ("search.command", "from cocoa_pl.search.index import x"),
    ],
)
def test_other_imports_are_not(place: str, source: str) -> None:
    assert wrong_imports(place, ast.parse(source)) == []


# ---- branches ----


def branches(names: set[str], place: str, tree: ast.Module) -> list[str]:
    """Comparison, membership, match, prefix test or dispatch table with one of `names`.

    Outside `models` also in other spellings (`qwen2_vl` for `qwen2vl`): a backbone's own file may
    ask what transformers calls it.
    """
    spell = str if room_of(place) == "models" else plainly
    wanted = {spell(name) for name in names}
    return [
        f"{place} line {node.lineno} branches on {node.value!r}"
        for expression in branched_on(tree)
        for node in elements(expression)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if spell(node.value) in wanted
    ]


def plainly(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "").replace(".", "")


def branched_on(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from node.args if node.func.attr in {"startswith", "endswith"} else ()
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            yield node.value


def elements(node: ast.expr) -> list[ast.expr]:
    """What is inside a literal collection (the keys of a dict), or the node itself."""
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    return node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]


@pytest.mark.parametrize("group", ["model", "stage"])
def test_nothing_branches_on_a_configured_name(group: str) -> None:
    names = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
    assert names, f"conf/{group} is empty: nothing was checked"
    assert [one for place, tree in MODULES.items() for one in branches(names, place, tree)] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("if name == 'qwen2vl': pass", 1),
        ("if 'qwen2_vl' != config.model_type: pass", 1),
        ("x = 1 if stage in ('warmup', 'other') else 2", 1),
        ("if kind in {'warmup': 1}: pass", 1),
        ("x = {'warmup': 1, 'other': 2}[stage]", 1),
        ("x = name.startswith('qwen2vl')", 1),
        ("match stage:\n    case 'warmup': pass", 1),
        ("name = 'warmup'", 0),
        ("log(f'after {stage}', 'warmup')", 0),
        ("if name == 'other': pass", 0),
    ],
)
def test_a_branch_on_a_name_is_reported(source: str, count: int) -> None:
    assert len(branches({"qwen2vl", "warmup"}, "stages.recipe", ast.parse(source))) == count


def test_a_backbone_may_ask_what_transformers_calls_it() -> None:
    tree = ast.parse("assert config.model_type == 'qwen2_vl'")
    assert branches({"qwen2vl"}, "models.qwen_vl", tree) == []
