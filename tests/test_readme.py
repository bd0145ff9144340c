"""Commands of the README and of docs/ are configurations that exist; most are run, too, by
tests/docs/test_commands.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from cocoa_pl.command_line import CONFIGS, check_overrides
from cocoa_pl.entry import register_resolvers
from tests.docs.pages import HERE

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[list[str]]:
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(r"(?:python |per-node 8 |29500 +)((?:train|evaluate)\.py [^\n`]*)", text)
    words = [shlex.split(re.split("  #", command)[0]) for command in found]
    # Hydra's own options are taken where commands are run: tests/docs/test_commands.py.
    words = [command for command in words if not {"--config-dir", "--cfg"} & {*command}]
    return [[word for word in command if "..." not in word] for command in words]


def not_run() -> list[list[str]]:
    """Those that tests/docs/test_commands.py leaves out by default."""
    run = [shlex.split(command)[1:] for command in HERE if " -m " not in command]
    return [command for command in commands() if command not in run]


def test_the_pages_hold_commands() -> None:
    assert len(commands()) >= 20
    assert not_run()
    assert any("torchrun" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("command", not_run(), ids=" ".join)
def test_a_command_composes(command: list[str]) -> None:
    script, *words = command
    register_resolvers()
    overrides = [word for word in words if not word.startswith("-")]
    config = check_overrides(script.removesuffix(".py"), overrides)
    chosen = [o.split(",")[0] if "-m" in words else o for o in overrides]
    for override in chosen:
        key, value = override.split("=", 1)
        if key.startswith("hydra.") or "@" in key or (CONFIGS / key.lstrip("+")).is_dir():
            continue
        found = _select(config, key)
        if OmegaConf.is_config(found):
            assert OmegaConf.to_container(found) == yaml.safe_load(value)  # type: ignore[arg-type]
        else:
            assert str(found) == value


def _select(config: object, key: str) -> object:
    for part in key.split("."):
        config = config[part]  # type: ignore[index]
    return config
