"""`cocoa attention`: the grid of the paper, a picture, and mistakes told in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cocoa_pl import cli
from cocoa_pl.command_line import CONFIGS
from cocoa_pl.errors import UserError

POLICIES = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))

PAPER = """\
A A E B B
1 1 1 0 0
1 1 1 0 0
1 1 1 1 1
0 0 1 1 1
0 0 1 1 1
"""


def test_the_printed_grid_is_the_papers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli._run(["attention", "eos_bridge", "--png", str(tmp_path / "grid.png")])
    assert PAPER in capsys.readouterr().out


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_has_a_picture(policy: str, tmp_path: Path) -> None:
    png = tmp_path / "grid.png"
    cli._run(["attention", policy, "--lengths", "3,1,4", "--png", str(png)])
    with Image.open(png) as picture:
        assert picture.size[0] > 300
        # unseen cells aside, the three segments' colours are there
        assert len(picture.convert("RGB").quantize(64).getcolors()) > 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["eos_brigde"], "there is no attention policy eos_brigde"),
        (["causal", "--lengths", "2,1"], "--lengths is CONTEXT,EOS,TARGET"),
        (["causal", "--lengths", "2,2,1"], "one EOS"),
        (["causal", "--text", "a dog"], "needs --model"),
        (["causal", "--target", "a dog", "--model", "runs/A"], "needs --text or --image"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        cli._run(["attention", *arguments])
