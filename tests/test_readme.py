"""The README's commands are configurations that exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from cocoa_pl.command_line import CONFIGS, check_command_line
from cocoa_pl.entry import register_resolvers

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def commands() -> list[list[str]]:
    text = README.replace("\\\n", " ")
    found = re.findall(r"python ((?:train|evaluate)\.py[^\n`]*)", text)
    return [shlex.split(command.split("  #")[0]) for command in found]


def test_the_readme_holds_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_of_the_readme_composes(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *overrides = command
    register_resolvers()
    monkeypatch.setattr(sys, "argv", command)
    check_command_line(script.removesuffix(".py"))
    sweep = "-m" in overrides
    chosen = [o.split(",")[0] if sweep else o for o in overrides if not o.startswith("-")]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(script.removesuffix(".py"), overrides=chosen)
    for override in chosen:
        key, value = override.split("=", 1)
        if "@" not in key and not (CONFIGS / key.lstrip("+")).is_dir():
            assert str(_select(config, key)) == value


def _select(config: object, key: str) -> object:
    for part in key.split("."):
        config = config[part]  # type: ignore[index]
    return config
