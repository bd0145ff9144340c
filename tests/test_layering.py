"""The house rules that a syntax tree can show.

Each rule takes a parsed `Module` and returns its violations. It is run over the whole package, and
over snippets that must and must not be reported: a rule that has gone blind fails.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cocoa_pl"

# Lowest first. A module may import its own layer and the layers above it in this table.
LAYERS = (
    {"errors", "config.bounds", "attention"},
    {"losses", "grad_cache", "distributed"},
    {"models", "data"},
    {
        *("stages", "evaluation", "embedder", "export", "doctor", "search", "for_mteb"),
    },
    {
        *("cli", "sweep", "config", "run", "planning", "mining"),
        *(f"{tool}.command" for tool in ("attention", "doctor", "export", "search")),
    },
)
# Within a layer, or against its direction, these would be allowed by the table alone.
FORBIDDEN = {("data", "models"), ("evaluation", "models")}
KNOWS_HYDRA = LAYERS[-1] - {"cli"}
PUBLIC = {"embedder", "data"}  # what the package itself offers


@dataclass(frozen=True)
class Module:
    """A source file by its place in the package: `("data", "mmeb")` for `cocoa_pl/data/mmeb.py`."""

    path: tuple[str, ...]
    tree: ast.Module
    is_package: bool

    @property
    def component(self) -> str:
        """What has a layer: the first level below the package, empty for its own `__init__`."""
        return component_of(self.path)


Rule = Callable[[Module], list[str]]


def component_of(path: Sequence[str]) -> str:
    """The first level of a place, or the first two where LAYERS has them apart."""
    two = ".".join(path[:2])
    return two if layer_of(two) is not None else ".".join(path[:1])


def parse(source: str, *, at: str, is_package: bool) -> Module:
    """`at` is the dotted place in the package, such as `data.mmeb`."""
    return Module(tuple(at.split(".")) if at else (), ast.parse(source), is_package)


def walk_package() -> list[Module]:
    base = ROOT / "src" / PACKAGE
    modules = []
    for file in sorted(base.rglob("*.py")):
        is_package = file.name == "__init__.py"
        place = (file.parent if is_package else file.with_suffix("")).relative_to(base).parts
        modules.append(parse(file.read_text(), at=".".join(place), is_package=is_package))
    return modules


def config_names(group: str) -> set[str]:
    return {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}


# ---- imports ----


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import: in functions and for type checking too."""
    here = (PACKAGE, *module.path)
    package = here if module.is_package else here[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*anchor, *([node.module] if node.module else [])))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def imported_components(module: Module) -> Iterator[tuple[int, str]]:
    for line, name in imported(module):
        parts = name.split(".")
        component = component_of(parts[1:])
        if parts[0] == PACKAGE and len(parts) > 1 and component != module.component:
            yield line, component


def layer_of(component: str) -> int | None:
    return next((rank for rank, layer in enumerate(LAYERS) if component in layer), None)


def imports_go_one_way(module: Module) -> list[str]:
    found = list(imported_components(module))
    if not module.component:
        return [
            f"line {line}: the package itself imports {name}"
            for line, name in found
            if name not in PUBLIC
        ]
    own = layer_of(module.component)
    if own is None:
        return [f"{module.component} has no place in LAYERS; give it one"]
    violations = []
    for line, name in found:
        other = layer_of(name)
        if other is None:
            violations.append(f"line {line}: imports {name}, which has no place in LAYERS")
        elif other > own or (module.component, name) in FORBIDDEN:
            violations.append(f"line {line}: {module.component} must not import {name}")
    return violations


def hydra_stays_at_the_entry_points(module: Module) -> list[str]:
    if module.component in KNOWS_HYDRA:
        return []
    return [
        f"line {line}: imports {name}"
        for line, name in imported(module)
        if name.split(".")[0] in {"hydra", "omegaconf"}
    ]


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """A path of components that ends where it began, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


# ---- what a module may contain ----


def nothing_catches_everything(module: Module) -> list[str]:
    return [
        f"line {line}: catches everything"
        for line, caught in _caught(module.tree)
        if {_last_name(one) for one in _elements(caught)} & {"Exception", "BaseException"}
    ]


def _caught(tree: ast.Module) -> Iterator[tuple[int, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            # A bare `except:` is one for BaseException.
            yield node.lineno, node.type or ast.Name("BaseException")
        elif isinstance(node, ast.Call) and _last_name(node.func) == "suppress":
            yield from ((node.lineno, argument) for argument in node.args)


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def no_branch_on(names: set[str]) -> Rule:
    """Comparison, membership, match, prefix test or dispatch table with one of `names`.

    Outside `models` also in other spellings (`qwen2_vl` for `qwen2vl`): a backbone's own file may
    ask what transformers calls it.
    """

    def rule(module: Module) -> list[str]:
        spell = str if module.component == "models" else _spelled_plainly
        wanted = {spell(name) for name in names}
        return [
            f"line {node.lineno}: branches on {node.value!r}"
            for expression in _branched_on(module.tree)
            for node in _elements(expression)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if spell(node.value) in wanted
        ]

    return rule


def _branched_on(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.Call) and _last_name(node.func) in {"startswith", "endswith"}:
            yield from node.args
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            yield node.value


def _elements(node: ast.expr) -> list[ast.expr]:
    """What is inside a literal collection (the keys of a dict), or the node itself."""
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    return node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]


def _spelled_plainly(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "").replace(".", "")


# ---- the package keeps the rules ----

MODULES = walk_package()
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        imports_go_one_way,
        hydra_stays_at_the_entry_points,
        nothing_catches_everything,
    )
}


def violations_of(rule: Rule) -> list[str]:
    return [f"{'.'.join(m.path) or PACKAGE}: {message}" for m in MODULES for message in rule(m)]


def test_the_walker_sees_the_package() -> None:
    seen = {".".join(module.path) for module in MODULES}
    assert {"", "errors", "attention.policy", "data.batch", "models"} <= seen
    edges = {(m.component, name) for m in MODULES for _, name in imported_components(m)}
    assert ("attention", "errors") in edges or ("data", "errors") in edges


@pytest.mark.parametrize("name", RULES)
def test_the_package_keeps_the_rule(name: str) -> None:
    assert violations_of(RULES[name]) == []


def test_components_do_not_import_each_other_in_a_circle() -> None:
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    assert find_cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        names = {name for _, name in imported_components(module)}
        edges[module.component] = edges.get(module.component, set()) | names
    assert find_cycle(edges) == []


@pytest.mark.parametrize("group", ["model", "stage"])
def test_no_branch_on_a_configured_name(group: str) -> None:
    names = config_names(group)
    assert names, f"conf/{group} is empty: nothing was checked"
    assert violations_of(no_branch_on(names)) == []


# ---- the rules see what they are meant to see ----

BAD: list[tuple[str, str, str]] = [
    ("imports_go_one_way", "data.mmeb", "from cocoa_pl.models import heads"),
    ("imports_go_one_way", "data.mmeb", "from ..models.backbone import Backbone"),
    ("imports_go_one_way", "data.mmeb", "def f() -> None:\n    import cocoa_pl.evaluation"),
    ("imports_go_one_way", "errors", "from . import attention, models"),
    ("imports_go_one_way", "evaluation.report", "from cocoa_pl import models"),
    ("imports_go_one_way", "evaluation.report", "from cocoa_pl.newcomer import x"),
    ("imports_go_one_way", "newcomer", "x = 1"),
    ("imports_go_one_way", "", "from cocoa_pl.stages.base import StageModule"),
    ("hydra_stays_at_the_entry_points", "stages.recipe", "from omegaconf import DictConfig"),
    ("hydra_stays_at_the_entry_points", "models.backbone", "import hydra.utils"),
    ("nothing_catches_everything", "items", "try:\n    f()\nexcept:\n    raise"),
    ("nothing_catches_everything", "items", "try:\n    f()\nexcept Exception as e:\n    raise"),
    ("nothing_catches_everything", "items", "try:\n    f()\nexcept (OSError, BaseException): 0"),
    ("nothing_catches_everything", "items", "with contextlib.suppress(Exception):\n    f()"),
]
GOOD: list[tuple[str, str, str]] = [
    (
        "imports_go_one_way",
        "data.mmeb",
        "from cocoa_pl.data.batch import Batch\nfrom .images import x",
    ),
    ("imports_go_one_way", "models.backbone", "from cocoa_pl.attention.plan import Plan"),
    ("imports_go_one_way", "stages.recipe", "import torch\nfrom cocoa_pl import models"),
    ("hydra_stays_at_the_entry_points", "sweep", "from omegaconf import OmegaConf"),
    ("nothing_catches_everything", "items", "try:\n    f()\nexcept (OSError, ValueError): 0"),
]


@pytest.mark.parametrize(("rule", "at", "source"), BAD)
def test_a_rule_reports_what_breaks_it(rule: str, at: str, source: str) -> None:
    assert len(RULES[rule](parse(source, at=at, is_package=at == ""))) == 1


@pytest.mark.parametrize(("rule", "at", "source"), GOOD)
def test_a_rule_leaves_the_rest_alone(rule: str, at: str, source: str) -> None:
    assert RULES[rule](parse(source, at=at, is_package=False)) == []


@pytest.mark.parametrize(
    "source",
    [
        "if name == 'qwen2vl': pass",
        "if 'qwen2_vl' != config.model_type: pass",
        "x = 1 if stage in ('warmup', 'other') else 2",
        "if kind in {'warmup': 1}: pass",
        "x = {'warmup': 1, 'other': 2}[stage]",
        "x = name.startswith('qwen2vl')",
        "match stage:\n    case 'warmup': pass",
    ],
)
def test_a_branch_on_a_name_is_reported(source: str) -> None:
    assert (
        len(no_branch_on({"qwen2vl", "warmup"})(parse(source, at="stages", is_package=True))) == 1
    )


def test_a_backbone_may_ask_what_transformers_calls_it() -> None:
    rule, source = no_branch_on({"qwen2vl"}), "assert config.model_type == 'qwen2_vl'"
    assert rule(parse(source, at="models.qwen_vl", is_package=False)) == []
    assert len(rule(parse(source, at="stages.recipe", is_package=False))) == 1


@pytest.mark.parametrize(
    "source", ["name = 'warmup'", "log(f'after {stage}', 'warmup')", "if name == 'other': pass"]
)
def test_a_name_without_a_branch_is_not_reported(source: str) -> None:
    assert no_branch_on({"qwen2vl", "warmup"})(parse(source, at="stages", is_package=True)) == []
