"""Commands of the pages, of the configs' headers and of help texts are configurations that exist;
most are run, too, by tests/docs/test_commands.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from cocoa_pl.config.build import check_values
from cocoa_pl.config.command_line import CONFIGS, compose_overrides
from tests.docs.pages import HERE

ROOT = Path(__file__).resolve().parents[1]
PLACES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "train.py", ROOT / "evaluate.py"]
PLACES += sorted(
    path
    for folder, kind in (("docs", "md"), ("conf", "yaml"), ("docs/examples", "yaml"), ("src", "py"))
    for path in (ROOT / folder).rglob(f"*.{kind}")
)
PAGES = [place for place in PLACES if place.suffix == ".md"]

SCRIPT = r"(?:python |per-node[ =]\d |29500 +)(train|evaluate)\.py"
COMMAND = re.compile(rf"(?:{SCRIPT}|\bcocoa (doctor|plan|mine)) ([^\n`]*=[^\n`]*)")


def commands() -> list[list[str]]:
    """A script or sub-command with its overrides, of pages, headers of configs and help texts."""
    text = "\n".join(place.read_text() for place in PLACES)
    found = COMMAND.findall(re.sub(r"\\\n[# ]*", "", text))
    split = [
        (script or tool, *shlex.split(re.split(r'  +[#(]|"', o)[0])) for script, tool, o in found
    ]
    return [taken for words in dict.fromkeys(split) if len(taken := overrides(words)) > 1]


def overrides(words: Sequence[str]) -> list[str]:
    """The name and what can be composed; nothing of Hydra's own options, which
    tests/docs/test_commands.py takes. In a header, what may be left out stands in brackets.
    """
    if {"--config-dir", "--cfg"} & {*words}:
        return []
    plain = [w[1:-1] if w.startswith("[") and w.endswith("]") else w for w in words]
    unspoken = ("...", "{", "key=value", "KEY=VALUE")
    kept = [w for w in plain if "=" in w or w == "-m"]
    return [words[0], *(w for w in kept if not any(part in w for part in unspoken))]


def not_run() -> list[list[str]]:
    """Those that tests/docs/test_commands.py leaves out by default, and no longer one contains."""
    words = [shlex.split(command) for command in HERE if " -m " not in command]
    run = [overrides([w[1].removesuffix(".py"), *w[2:]]) for w in words]
    every = commands()
    longest = [one for one in every if not any({*one} < {*other} for other in every)]
    return [command for command in longest if command not in run]


def marked(command: list[str]) -> Any:
    """Those of the pages; what headers of configs and help texts say beyond them takes longer."""
    shown = " ".join("\n".join(place.read_text() for place in PAGES).replace("\\\n", " ").split())
    is_shown = all(word in shown for word in command[1:])
    return pytest.param(command, id=" ".join(command), marks=[pytest.mark.slow] * (not is_shown))


def test_the_pages_hold_commands() -> None:
    assert len(commands()) >= 50
    assert not_run()


@pytest.mark.parametrize("command", [marked(command) for command in not_run()])
def test_a_command_composes(command: list[str]) -> None:
    name, *words = command
    given = [word for word in words if not word.startswith("-")]
    chosen = [o.split(",")[0] if "-m" in words else o for o in given]
    config = compose_overrides(name, chosen)
    check_values(config)
    for override in chosen:
        key, value = override.split("=", 1)
        if key.startswith("hydra.") or "@" in key or (CONFIGS / key.lstrip("+")).is_dir():
            continue
        found = _select(config, key)
        if OmegaConf.is_config(found):
            assert OmegaConf.to_container(found) == yaml.safe_load(value)  # type: ignore[arg-type]
        else:
            assert str(found) == str(yaml.safe_load(value))


def _select(config: object, key: str) -> object:
    for part in key.split("."):
        config = config[part]  # type: ignore[index]
    return config
