"""The table of each YAML policy, drawn as the grid of the paper's figure."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cocoa_pl.attention import Policy, dense_mask, grid_text

CONF = Path(__file__).parents[2] / "conf" / "attention"
LABELS = "AAEBB"
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
ALL = ("context", "eos", "target")


def load_policy(name: str) -> Policy:
    policy: Policy = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all")
    return policy


def test_every_policy_file_has_a_grid_here() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(GRIDS)


@pytest.mark.parametrize("name", GRIDS)
def test_printed_grid_is_the_documented_one(name: str) -> None:
    policy = load_policy(name)
    assert policy.name == name
    assert grid_text(dense_mask(policy, torch.tensor([[2, 1, 2]])), LABELS) == GRIDS[name]


@pytest.mark.parametrize("name", GRIDS)
def test_without_target_every_policy_but_causal_is_bidirectional(name: str) -> None:
    mask = dense_mask(load_policy(name), torch.tensor([[3, 1, 0]]))
    full = torch.ones(4, 4, dtype=torch.bool)
    assert torch.equal(mask, full.tril() if name == "causal" else full)


@pytest.mark.parametrize("name", GRIDS)
def test_samples_never_see_each_other(name: str) -> None:
    lengths = torch.tensor([[2, 1, 2], [1, 1, 0], [0, 1, 3]])
    mask = dense_mask(load_policy(name), lengths)
    alone = [dense_mask(load_policy(name), one[None]) for one in lengths]
    assert torch.equal(mask, torch.block_diag(*alone).bool())


@pytest.mark.parametrize("name", GRIDS)
def test_policy_is_rebuilt_from_its_plain_data(name: str) -> None:
    policy = load_policy(name)
    again = Policy(**policy.to_dict())  # type: ignore[arg-type]
    assert again == policy
    assert again.to_dict() == policy.to_dict()


def test_unknown_segment_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"toy: eos names unknown segments \{'targets'\}"):
        Policy("toy", context=ALL, eos=("eos", "targets"), target=ALL, causal=False)


@pytest.mark.parametrize("seen", [(), ("context", "eos")], ids=["empty row", "not itself"])
def test_row_that_does_not_see_itself_is_refused(seen: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="toy: target must at least see itself"):
        Policy("toy", context=ALL, eos=ALL, target=seen, causal=False)


def test_causal_policy_with_a_partial_table_is_refused() -> None:
    with pytest.raises(ValueError, match="toy: a causal policy sees all segments"):
        Policy("toy", context=("context", "eos"), eos=ALL, target=ALL, causal=True)
