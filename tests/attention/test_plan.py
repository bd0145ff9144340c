"""Plans against the dense mask: the same pairs of tokens, counted and listed."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Plan, Policy, dense_mask, make_plan, self_plan
from cocoa_pl.attention.rectangles import Rectangle

ALL = ("context", "eos", "target")
POLICIES = {
    "bidirectional": Policy("bidirectional", ALL, ALL, ALL, False),
    "eos_bridge": Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), False),
    "strict": Policy("strict", ("context", "eos"), ("context", "eos"), ("eos", "target"), False),
    "isolated": Policy("isolated", ("context",), ("eos",), ("target",), False),
    # CONTEXT and TARGET see the same two ranges, with a gap between them; EOS another list.
    "gap": Policy("gap", ("context", "target"), ALL, ("context", "target"), False),
    "causal": Policy("causal", ALL, ALL, ALL, True),
}


def random_lengths(seed: int) -> Tensor:
    """(S, 3) with one EOS each; every third CONTEXT or TARGET is empty."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 7, (), generator=generator))
    lengths = torch.randint(0, 20, (samples, 3), generator=generator)
    lengths[torch.rand(samples, 3, generator=generator) < 1 / 3] = 0
    lengths[:, 1] = 1
    return lengths


def seen_pairs(plan: Plan) -> Tensor:
    """(T, T) bool, read off the plan's index arithmetic."""
    tokens = int(plan.cu_seqlens_q[-1])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    ranges = zip(
        pairwise(plan.cu_seqlens_q.tolist()), pairwise(plan.cu_seqlens_k.tolist()), strict=True
    )
    for (first, last), (start, stop) in ranges:
        for query, key in product(range(first, last), plan.kv_index[start:stop].tolist()):
            assert not seen[query, key], "a key is listed twice"
            seen[query, key] = not plan.causal or key <= query
    return seen


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(10))
def test_plan_lists_exactly_the_pairs_of_the_dense_mask(name: str, seed: int) -> None:
    lengths = random_lengths(seed)
    plan = make_plan(POLICIES[name], lengths)
    assert torch.equal(seen_pairs(plan), dense_mask(POLICIES[name], lengths))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "causal"])
@pytest.mark.parametrize("seed", range(5))
def test_number_of_scores_is_that_of_the_dense_mask(name: str, seed: int) -> None:
    lengths = random_lengths(seed)
    needed = int(dense_mask(POLICIES[name], lengths).sum())
    assert make_plan(POLICIES[name], lengths).num_scores == needed


@pytest.mark.parametrize("seed", range(5))
def test_bridge_saves_the_two_blocks_between_context_and_target(seed: int) -> None:
    lengths = random_lengths(seed)
    context, _, target = lengths.unbind(1)
    closed_form = (lengths.sum(1) ** 2 - 2 * context * target).sum()
    assert make_plan(POLICIES["eos_bridge"], lengths).num_scores == int(closed_form)


def test_bridge_is_three_segments_a_sample_and_bidirectional_one() -> None:
    lengths = torch.tensor([[2, 1, 2], [4, 1, 3]])
    bridge = make_plan(POLICIES["eos_bridge"], lengths)
    assert bridge.cu_seqlens_q.tolist() == [0, 2, 3, 5, 9, 10, 13]
    assert bridge.cu_seqlens_k.tolist() == [0, 3, 8, 11, 16, 24, 28]
    assert bridge.kv_index[:11].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    both = make_plan(POLICIES["bidirectional"], lengths)
    assert both.cu_seqlens_q.tolist() == both.cu_seqlens_k.tolist() == [0, 5, 13]
    assert both.kv_index.tolist() == list(range(13))


def test_segments_of_equal_size_need_no_mask() -> None:
    (rectangle,) = self_plan(torch.tensor([4, 4, 4])).rectangles
    assert rectangle == Rectangle(segments=3, queries=4, keys=4, masked=False)


@pytest.mark.parametrize("name", POLICIES)
def test_every_token_is_a_query_once_and_finds_its_output(name: str) -> None:
    plan = make_plan(POLICIES[name], random_lengths(3))
    slots = plan.padded.q.index
    assert torch.equal(slots[plan.padded.q.first], torch.arange(int(plan.cu_seqlens_q[-1])))


def test_self_plan_is_the_bidirectional_plan_of_images() -> None:
    images = self_plan(torch.tensor([3, 1, 5]))
    samples = make_plan(POLICIES["bidirectional"], torch.tensor([[2, 1, 0], [0, 1, 0], [4, 1, 0]]))
    assert torch.equal(seen_pairs(images), seen_pairs(samples))
