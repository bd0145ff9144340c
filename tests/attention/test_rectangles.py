"""Rectangles: no partition costs much less, what pads computes the same, and plans travel ready."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from cocoa_pl.attention import Plan, Policy, attend, make_plan, self_plan
from cocoa_pl.attention.rectangles import CPU_CALL_COST, GPU_CALL_COST, Integers, partition

CONFIGS = Path(__file__).parents[2] / "conf" / "attention"
POLICIES = {
    path.stem: Policy(**{k: v for k, v in yaml.safe_load(path.read_text()).items() if k[0] != "_"})
    for path in sorted(CONFIGS.glob("*.yaml"))
}
COSTS = (0, CPU_CALL_COST, GPU_CALL_COST)


def cost_of(groups: list[Integers], q: Integers, k: Integers, call_cost: int) -> int:
    return sum(len(g) * int(q[g].max()) * int(k[g].max()) + call_cost for g in groups)


def by_powers_of_two(q: Integers, k: Integers) -> list[Integers]:
    sizes = np.stack([np.ceil(np.log2(q)), np.ceil(np.log2(k))])
    _, group = np.unique(sizes, axis=1, return_inverse=True)
    return [np.flatnonzero(group.ravel() == g) for g in range(group.max() + 1)]


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to cut a set into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for place in range(len(groups)):
            yield [*groups[:place], [first, *groups[place]], *groups[place + 1 :]]


def skewed_lengths(samples: int, seed: int) -> Tensor:
    """CONTEXT of about 300 tokens, TARGET of about 40, both with long tails."""
    rng = np.random.default_rng(seed)
    context, target = (
        np.maximum(0, rng.lognormal(np.log(median), 0.8, samples).astype(int) - cut)
        for median, cut in ((300, 0), (40, 30))
    )
    return torch.from_numpy(np.stack([context, np.ones(samples, dtype=int), target], axis=1))


def sides(plan: Plan) -> tuple[Integers, Integers]:
    return plan.cu_seqlens_q.diff().long().numpy(), plan.cu_seqlens_k.diff().long().numpy()


@pytest.mark.parametrize("call_cost", COSTS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("samples", "seed"), [(1, 0), (2, 1), (7, 2), (40, 3), (150, 4)])
def test_no_simple_partition_costs_less(samples: int, seed: int, name: str, call_cost: int) -> None:
    q, k = sides(make_plan(POLICIES[name], skewed_lengths(samples, seed)))
    groups = partition(q, k, call_cost=call_cost)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(q)))
    found = cost_of(groups, q, k, call_cost)
    for others in (by_powers_of_two(q, k), [np.arange(len(q))]):
        assert found <= cost_of(others, q, k, call_cost)


@pytest.mark.parametrize("call_cost", [0, 30, 300, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_of_all_partitions_of_samples_that_see_themselves_none_costs_less(
    seed: int, call_cost: int
) -> None:
    """Where queries and keys grow together: bidirectional, causal, images, windows."""
    sizes = np.random.default_rng(seed).integers(1, 40, 7)
    found = cost_of(partition(sizes, sizes, call_cost=call_cost), sizes, sizes, call_cost)
    every = (
        cost_of([np.array(group) for group in groups], sizes, sizes, call_cost)
        for groups in partitions(list(range(7)))
    )
    assert found == min(every)


def test_calls_are_worth_their_cost_and_no_more() -> None:
    sizes = np.array([10, 11, 300, 301])
    assert len(partition(sizes, sizes, call_cost=0)) == 4
    assert len(partition(sizes, sizes, call_cost=CPU_CALL_COST)) == 3  # 301 less 300 is 601 scores
    assert len(partition(sizes, sizes, call_cost=5000)) == 2
    assert len(partition(sizes, sizes, call_cost=10**6)) == 1


def test_there_is_no_loop_over_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of segments of a few sizes are a few rectangles, made by a few operations."""
    counted = []
    original = torch.arange

    def arange(*given: object, **more: object) -> Tensor:
        counted.append(1)
        return original(*given, **more)

    plan = self_plan(torch.tensor([64, 32, 16]).repeat(1000))
    monkeypatch.setattr(torch, "arange", arange)
    assert [r.segments for r in plan.padded.rectangles] == [1000] * 3
    assert len(counted) < 20


def test_equal_segments_need_no_mask_and_causal_ones_never_do() -> None:
    lengths = torch.tensor([[n, 1, 0] for n in (5, 5, 9, 10, 11, 30)])
    for name in POLICIES:
        padded = make_plan(POLICIES[name], lengths).padded
        for rectangle, mask in zip(padded.rectangles, padded.masks, strict=True):
            assert (mask is not None) == rectangle.masked
    causal = make_plan(POLICIES["causal"], lengths).padded
    assert causal.masks == [None] * len(causal.rectangles)
    assert self_plan(torch.tensor([7, 7, 7])).padded.masks == [None]


# --- Ready before the step --------------------------------------------------------------------


def inputs(plan: Plan, *, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = int(plan.cu_seqlens_q[-1])
    return [
        torch.randn(tokens, heads, 8, generator=generator).to(device).requires_grad_()
        for heads in (4, 2, 2)
    ]


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_prepared_travels_and_is_not_made_again(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = make_plan(POLICIES[name], skewed_lengths(6, 0))
    ready = pickle.loads(pickle.dumps(fresh.to("meta").prepared(kernel))).to("cpu")
    monkeypatch.setattr("cocoa_pl.attention.plan.pad", None)
    monkeypatch.setattr("cocoa_pl.attention.plan.make_gather", None)
    form = ready.padded if kernel == "sdpa" else ready.packed
    monkeypatch.undo()
    expected = (
        fresh.to("meta").prepared(kernel).to("cpu").padded if kernel == "sdpa" else fresh.packed
    )
    assert torch.equal(
        form.q.index if kernel == "sdpa" else form.gather.index,  # type: ignore[union-attr]
        expected.q.index if kernel == "sdpa" else expected.gather.index,  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("name", POLICIES)
def test_a_prepared_plan_gives_the_output_of_a_fresh_one(name: str) -> None:
    fresh = make_plan(POLICIES[name], skewed_lengths(6, 0))
    states = inputs(fresh)
    ready = pickle.loads(pickle.dumps(fresh.prepared("sdpa")))
    found = attend(*states, ready, kernel="sdpa", scale=0.3)
    assert torch.equal(found, attend(*states, fresh, kernel="sdpa", scale=0.3))


@pytest.mark.parametrize("name", POLICIES)
def test_attention_by_a_plan_never_waits_for_the_device(name: str) -> None:
    """Tensors without values cannot be read back."""
    plan = make_plan(POLICIES[name], skewed_lengths(6, 0)).to("meta")
    for ready in (plan, plan.prepared("sdpa")):
        output = attend(*inputs(plan, device="meta"), ready, kernel="sdpa", scale=0.3)
        output.sum().backward()
        assert output.device.type == "meta"


def test_a_plan_cannot_be_prepared_for_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="cannot prepare a plan for attention kernel 'auto'"):
        self_plan(torch.tensor([3])).prepared("auto")
