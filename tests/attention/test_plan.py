"""Plans hold the pairs of tokens of the dense mask, and travel with what is made ahead of time."""

import pickle
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from cocoa_pl.attention import Plan, dense_mask, make_plan, self_plan
from cocoa_pl.attention.plan import Padded, on_device
from tests.attention.oracle import OURS, POLICIES, random_lengths


def seen_pairs(plan: Plan) -> Tensor:
    """(T, T) bool, read off the plan's ranges."""
    tokens = int(plan.cu_seqlens_q[-1])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    bounds = (pairwise(b.tolist()) for b in (plan.cu_seqlens_q, plan.cu_seqlens_k))
    for (first, last), (start, stop) in zip(*bounds, strict=True):
        for query, place in product(range(first, last), range(start, stop)):
            key = place if plan.kv_index is None else int(plan.kv_index[place])
            assert not seen[query, key], "a key is listed twice"
            seen[query, key] = not plan.causal or place - stop <= query - last
    return seen


def rectangles_of(plan: Plan) -> Padded:
    padded = plan.prepared("sdpa").padded
    assert padded is not None
    return padded


def padded_pairs(plan: Plan) -> Tensor:
    """(T, T) bool, read off the rectangles: what real queries see in them."""
    tokens = int(plan.cu_seqlens_q[-1])
    rows, padded = torch.arange(tokens), rectangles_of(plan)
    q, k, place = (rows if x is None else x for x in padded[2:])
    assert torch.equal(q[place], rows)
    is_real = torch.zeros(len(q), dtype=torch.bool).index_fill(0, place, value=True)
    q_sizes = [r.segments * r.queries for r in padded.rectangles]
    keys = k.split([r.segments * r.keys for r in padded.rectangles])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    parts = (padded.rectangles, padded.masks, q.split(q_sizes), keys, is_real.split(q_sizes))
    for r, mask, query, key, real in zip(*parts, strict=True):
        shape = (r.segments, r.queries, r.keys)
        allowed = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, 0].expand(shape)
        allowed = allowed.tril() if plan.causal and mask is None else allowed
        segment, row, column = (allowed & real.view(r.segments, r.queries, 1)).nonzero().T
        seen[query.view(shape[:2])[segment, row], key.view(r.segments, -1)[segment, column]] = True
    return seen


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_plan_and_its_rectangles_hold_the_pairs_of_the_dense_mask(name: str, seed: int) -> None:
    lengths = random_lengths(seed)
    plan, expected = make_plan(POLICIES[name], lengths), dense_mask(POLICIES[name], lengths)
    assert torch.equal(seen_pairs(plan), expected)
    assert torch.equal(padded_pairs(plan), expected)
    assert plan.causal or plan.num_scores == int(expected.sum())


def test_a_causal_bridge_is_two_segments_a_sample() -> None:
    """CONTEXT and BOTTLENECK see themselves as one; TARGET's keys end with its own tokens."""
    plan = make_plan(POLICIES["causal bridge"], torch.tensor([[2, 3, 2]]))
    assert plan.cu_seqlens_q.tolist() == [0, 5, 7]
    assert plan.kv_index is not None
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    corner, square = rectangles_of(plan).masks
    assert square is None  # SDPA's own causal mask, from the top left corner
    assert corner is not None
    assert corner[0, 0].long().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_bridge_is_three_segments_a_sample_and_bidirectional_one() -> None:
    lengths = torch.tensor([[2, 1, 2], [4, 1, 3]])
    bridge = make_plan(POLICIES["eos_bridge"], lengths)
    assert bridge.cu_seqlens_q.tolist() == [0, 2, 3, 5, 9, 10, 13]
    assert bridge.cu_seqlens_k.tolist() == [0, 3, 8, 11, 16, 24, 28]
    assert (bridge.max_q, bridge.max_k) == (4, 8)
    assert bridge.kv_index is not None
    assert bridge.kv_index[:11].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    assert bridge.num_scores == 25 + 64 - 2 * 2 * 2 - 2 * 4 * 3  # two blocks less of each
    both = make_plan(POLICIES["bidirectional"], lengths)
    assert both.cu_seqlens_q.tolist() == both.cu_seqlens_k.tolist() == [0, 5, 13]
    assert both.kv_index is None


@pytest.mark.parametrize("name", OURS)
def test_padding_is_bounded_and_calls_are_few(name: str) -> None:
    """Skewed lengths: CONTEXT and TARGET lognormal with medians of 300 and 40."""
    generator = torch.Generator().manual_seed(0)
    spread = (0.6 * torch.randn(64, 3, generator=generator)).exp()
    lengths = (spread * torch.tensor([300, 0, 40])).long() + 1
    plan = make_plan(POLICIES[name], lengths)
    rectangles = rectangles_of(plan).rectangles
    assert sum(r.scores for r in rectangles) < 1.75 * plan.num_scores
    assert len(rectangles) <= 16  # of up to 192 segments


def test_rows_as_they_lie_have_no_index_and_equal_segments_no_mask() -> None:
    (rectangle,), (mask,), *indices = rectangles_of(self_plan(torch.tensor([4, 4, 4])))
    assert (*rectangle, rectangle.scores) == (3, 4, 4, 48)
    assert mask is None
    assert indices == [None] * 3
    assert make_plan(POLICIES["causal"], random_lengths(0)).kv_index is None
    _, (mask,), *_ = rectangles_of(self_plan(torch.tensor([4, 3, 4])))
    assert mask is not None
    assert mask[:, 0, 0].sum(1).tolist() == [4, 3, 4]


# --- To another device --------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_travels_and_moves_with_its_rectangles(name: str) -> None:
    plan = make_plan(POLICIES[name], random_lengths(3))
    assert plan.prepared("varlen") is plan.prepared("flash") is plan
    there: Plan = pickle.loads(pickle.dumps(plan.prepared("sdpa"))).to("cpu")
    assert torch.equal(seen_pairs(there), seen_pairs(plan))
    assert torch.equal(padded_pairs(there), padded_pairs(plan))
    devices: list[str] = []
    apply_to_collection(there.to("meta"), Tensor, lambda x: devices.append(x.device.type))
    assert set(devices) == {"meta"}
    assert len(devices) >= 4


def test_copies_to_a_gpu_start_from_pinned_memory_and_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    host = torch.arange(3)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor is not host)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: calls.append("pin") or tensor.clone())
    monkeypatch.setattr(Tensor, "to", lambda tensor, *to, **how: calls.append((to, how)) or tensor)
    cuda = torch.device("cuda")
    on_device(host, cuda)
    on_device(torch.arange(3), cuda)  # pinned already
    copy = ((cuda,), {"non_blocking": True})
    assert calls == ["pin", copy, copy]
