"""The table of each YAML policy, drawn as the grid of the paper's figure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cocoa_pl.attention import Policy, dense_mask, grid_text, segment_letters
from cocoa_pl.config.build import build
from cocoa_pl.config.saved import load_config
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


def test_a_segment_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown segments \{'eos'\}; there are context, bottle"):
        Policy("toy", ["context", "eos"], ["bottleneck"], ["target"], causal=False)


@pytest.mark.parametrize("seen", ["", "AE"], ids=["empty row", "not itself"])
def test_row_that_does_not_see_itself_is_refused(seen: str) -> None:
    with pytest.raises(ValueError, match="toy: target must at least see itself"):
        table("toy", "AEB", "AEB", seen)
