"""The `cocoa` command imports a sub-command only when it runs, and reports mistakes in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from cocoa_pl import cli
from cocoa_pl.config.process import MISTAKE


def test_a_policy_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "grid.png"
    assert cli.run(["attention", "eos_bridge", "--lengths", "3,1,1", "--png", str(png)]) == 0
    assert "A A A E B\n1 1 1 1 0\n" in capsys.readouterr().out
    with Image.open(png) as picture:
        assert picture.size[0] > 300
        # unseen cells aside, the three segments' colours are there
        assert len(picture.convert("RGB").quantize(64).getcolors()) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eos_brigde"], "there is no attention policy eos_brigde"),
        (["causal", "--lengths", "2,1"], "--lengths is CONTEXT,BOTTLENECK,TARGET"),
        (["causal", "--lengths", "2,0,1"], "has a BOTTLENECK"),
        (["causal", "--text", "a dog"], "needs --model"),
        (["causal", "--target", "a dog", "--model", "runs/A"], "needs --text or --image"),
        (["causal", "--png", "/no/folder.png"], "/no/folder.png: No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["attention", *arguments]) == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_help_names_every_command_and_loads_none() -> None:
    """A user who asks what there is does not wait for torch."""
    code = (
        "import sys\nfrom cocoa_pl import cli\ntry:\n    cli.run(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "loaded = {'torch', 'transformers', 'lightning', 'hydra'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize(
    "name", ["plan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("doctor", "mine"))]
)
def test_a_command_with_overrides_is_a_hydra_app(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run([name, "--help"])
    assert stop.value.code == 0
    assert f"  cocoa {name} " in capsys.readouterr().out
    assert cli.run([name, "--cfg", "job", "data=pairs"]) == 0
    assert "path: ???" in capsys.readouterr().out
    assert cli.run([name, "--config-dir", "nowhere"]) == MISTAKE
    assert cli.run([name, "-m", "data.subsets=[é],[b]"]) == MISTAKE
    assert capsys.readouterr().err.count("\n") == 2
    assert not any(tmp_path.iterdir())


def test_an_unknown_command_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(["docter"])
    assert stop.value.code == MISTAKE
    assert "invalid choice: 'docter'" in capsys.readouterr().err


def test_a_commands_exit_status_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(arguments: list[str], console: Console) -> int:
        seen.append(arguments)
        return 1

    module = types.ModuleType("finds_something")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cocoa_pl.finds_something", module)
    monkeypatch.setitem(cli.COMMANDS, "find", ("finds_something", "finds something"))
    assert cli.run(["find", "data=mmeb", "data.root=x"]) == 1
    assert seen == [["data=mmeb", "data.root=x"]]


@pytest.mark.parametrize(("policy", "spins"), [(None, "1000"), ("ACTIVE", "None")])
def test_threads_spin_for_a_short_time_unless_the_user_says_how_they_wait(
    policy: str | None, spins: str
) -> None:
    """It counts only if it is set before torch is imported."""
    code = (
        "import os, sys, cocoa_pl; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    known = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    given = {} if policy is None else {"OMP_WAIT_POLICY": policy}
    found = subprocess.check_output([sys.executable, "-c", code], env=known | given, text=True)
    assert found == f"{spins} False\n"
