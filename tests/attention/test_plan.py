"""Plans hold the pairs of tokens of the dense mask, and travel with what is made ahead of time."""

import pickle
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Plan, dense_mask, make_plan, self_plan
from cocoa_pl.attention.plan import on_device
from tests.attention.oracle import OURS, POLICIES, random_lengths


def seen_pairs(plan: Plan) -> Tensor:
    """(T, T) bool, read off the plan's ranges."""
    tokens = int(plan.cu_seqlens_q[-1])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    bounds = (pairwise(b.tolist()) for b in (plan.cu_seqlens_q, plan.cu_seqlens_k))
    for (first, last), (start, stop) in zip(*bounds, strict=True):
        for query, place in product(range(first, last), range(start, stop)):
            key = int(plan.kv_index[place])
            assert not seen[query, key], "a key is listed twice"
            seen[query, key] = not plan.causal or place - stop <= query - last
    return seen


def padded_pairs(plan: Plan) -> Tensor:
    """(T, T) bool, read off the rectangles: what real queries see in them."""
    tokens = int(plan.cu_seqlens_q[-1])
    rows, padded = torch.arange(tokens), plan.padded
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
@pytest.mark.parametrize("seed", range(8))
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
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    corner, square = plan.padded.masks
    assert square is None  # SDPA's own causal mask, from the top left corner
    assert corner is not None
    assert corner[0, 0].long().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_bridge_is_three_segments_a_sample_and_bidirectional_one() -> None:
    lengths = torch.tensor([[2, 1, 2], [4, 1, 3]])
    bridge = make_plan(POLICIES["eos_bridge"], lengths)
    assert bridge.cu_seqlens_q.tolist() == [0, 2, 3, 5, 9, 10, 13]
    assert bridge.cu_seqlens_k.tolist() == [0, 3, 8, 11, 16, 24, 28]
    assert bridge.kv_index[:11].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    assert bridge.num_scores == 25 + 64 - 2 * 2 * 2 - 2 * 4 * 3  # two blocks less of each
    both = make_plan(POLICIES["bidirectional"], lengths)
    assert both.cu_seqlens_q.tolist() == both.cu_seqlens_k.tolist() == [0, 5, 13]
    assert both.kv_index.tolist() == list(range(13))


def test_self_plan_is_the_bidirectional_plan_of_images() -> None:
    images = self_plan(torch.tensor([3, 1, 5]))
    samples = make_plan(POLICIES["bidirectional"], torch.tensor([[2, 1, 0], [0, 1, 0], [4, 1, 0]]))
    assert torch.equal(seen_pairs(images), seen_pairs(samples))


@pytest.mark.parametrize("name", OURS)
def test_padding_is_bounded_and_calls_are_few(name: str) -> None:
    """Skewed lengths: CONTEXT and TARGET lognormal with medians of 300 and 40."""
    generator = torch.Generator().manual_seed(0)
    spread = (0.6 * torch.randn(64, 3, generator=generator)).exp()
    lengths = (spread * torch.tensor([300, 0, 40])).long() + 1
    plan = make_plan(POLICIES[name], lengths)
    assert sum(r.scores for r in plan.padded.rectangles) < 1.75 * plan.num_scores
    assert len(plan.padded.rectangles) <= 16  # of up to 192 segments


def test_rows_as_they_lie_have_no_index_and_equal_segments_no_mask() -> None:
    (rectangle,), (mask,), *indices = self_plan(torch.tensor([4, 4, 4])).padded
    assert (*rectangle, rectangle.scores) == (3, 4, 4, 48)
    assert mask is None
    assert indices == [None] * 3
    assert make_plan(POLICIES["causal"], random_lengths(0)).varlen.k_index is None
    _, (mask,), *_ = self_plan(torch.tensor([4, 3, 4])).padded
    assert mask is not None
    assert mask[:, 0, 0].sum(1).tolist() == [4, 3, 4]


# --- Made ahead of time ------------------------------------------------------------------------


def tensors_in(form: Any) -> list[Tensor]:
    if isinstance(form, Tensor):
        return [form]
    return [x for part in form for x in tensors_in(part)] if isinstance(form, tuple) else []


def form_of(plan: Plan, kernel: str) -> Any:
    return plan.padded if kernel == "sdpa" else plan.varlen


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_prepared_travels_and_moves_once(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_plan(POLICIES[name], random_lengths(3))
    expected = tensors_in(form_of(made, kernel))
    plan = made.prepared(kernel)
    for making in ("_pad", "_varlen"):
        monkeypatch.delattr(Plan, making)
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    there = pickle.loads(pickle.dumps(plan)).pin_memory().to("cpu")
    assert len(pinned) == len(expected) >= 2
    assert all(map(torch.equal, tensors_in(form_of(there, kernel)), expected))
    assert there.causal == made.causal
    elsewhere = plan.to("meta")
    assert {x.device.type for x in tensors_in(form_of(elsewhere, kernel))} == {"meta"}
    assert form_of(elsewhere, kernel) is form_of(elsewhere, kernel)


def test_nothing_is_made_to_be_pinned_and_the_kernel_must_be_named() -> None:
    plan = self_plan(torch.tensor([3]))
    assert plan.pin_memory().form is None
    with pytest.raises(KeyError, match="auto"):
        plan.prepared("auto")


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
