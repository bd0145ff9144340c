"""The table of each YAML policy, drawn as the grid of the paper's figure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cocoa_pl.attention import Policy, dense_mask, grid_text, segment_letters
from cocoa_pl.attention.command import load_policy
from cocoa_pl.config.build import build
from cocoa_pl.config.saved import load_config
from cocoa_pl.errors import UserError
from tests.attention.oracle import OURS, table

GRIDS = {
    "bidirectional": """\
A A E B B
1 1 1 1 1
1 1 1 1 1
1 1 1 1 1
1 1 1 1 1
1 1 1 1 1""",
    # The paper's figure (arXiv 2603.01471), for a CONTEXT of 2, EOS, and a TARGET of 2.
    "eos_bridge": """\
A A E B B
1 1 1 0 0
1 1 1 0 0
1 1 1 1 1
0 0 1 1 1
0 0 1 1 1""",
    "eos_bridge_strict": """\
A A E B B
1 1 1 0 0
1 1 1 0 0
1 1 1 0 0
0 0 1 1 1
0 0 1 1 1""",
    "causal": """\
A A E B B
1 0 0 0 0
1 1 0 0 0
1 1 1 0 0
1 1 1 1 0
1 1 1 1 1""",
}


def test_every_policy_file_has_a_grid_here() -> None:
    assert OURS.keys() == GRIDS.keys()


@pytest.mark.parametrize("name", GRIDS)
def test_printed_grid_is_the_documented_one(name: str) -> None:
    policy = OURS[name]
    assert policy.name == name
    mask = dense_mask(policy, torch.tensor([[2, 1, 2]]))
    assert grid_text(mask, segment_letters((2, 1, 2))) == GRIDS[name]


def test_a_bottleneck_of_two_and_a_causal_bridge() -> None:
    policy = table("causal bridge", "AE", "AEB", "EB", causal=True)
    assert grid_text(dense_mask(policy, torch.tensor([[1, 2, 2]])), segment_letters((1, 2, 2))) == (
        "A E E B B\n1 0 0 0 0\n1 1 0 0 0\n1 1 1 0 0\n0 1 1 1 0\n0 1 1 1 1"
    )


# --- Stored and written by hand ----------------------------------------------------------------


def before(policy: Policy) -> dict[str, Any]:
    """Plain data as it was written when BOTTLENECK was called `eos`."""
    renamed: dict[str, Any] = json.loads(json.dumps(policy.to_dict()).replace("bottleneck", "eos"))
    return renamed


@pytest.mark.parametrize("name", GRIDS)
def test_a_policy_is_built_from_stored_data_of_today_and_before(name: str) -> None:
    policy = OURS[name]
    assert "eos" in before(policy)
    for data in (policy.to_dict(), before(policy)):
        assert Policy.from_dict(data).to_dict() == policy.to_dict()


def test_the_config_of_an_older_run_is_read(tmp_path: Path) -> None:
    target = {"_target_": "cocoa_pl.attention.Policy"}
    stages = {name: {"policy": {**target, **before(policy)}} for name, policy in OURS.items()}
    config = {"stage": {"order": list(stages), **stages}, "seed": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    saved = load_config(tmp_path)
    assert saved.seed == 1
    for name, policy in OURS.items():
        assert build(saved.stage[name].policy).to_dict() == policy.to_dict()


def test_eos_in_a_file_of_ones_own_is_answered_with_the_new_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    rows = yaml.safe_dump({"_target_": "cocoa_pl.attention.Policy", **before(OURS["eos_bridge"])})
    file.write_text(rows)
    with pytest.raises(UserError, match="unknown key eos; there are name, context, bottleneck"):
        load_policy(str(file))
    file.write_text(rows.replace("\neos:", "\nbottleneck:"))
    with pytest.raises(
        UserError, match=r"unknown segments \{'eos'\}; there are context, bottleneck"
    ):
        load_policy(str(file))


@pytest.mark.parametrize("seen", ["", "AE"], ids=["empty row", "not itself"])
def test_row_that_does_not_see_itself_is_refused(seen: str) -> None:
    with pytest.raises(ValueError, match="toy: target must at least see itself"):
        table("toy", "AEB", "AEB", seen)
