"""How segments are cut into rectangles, against all ways there are and two simple ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from cocoa_pl.attention import Plan, Policy, make_plan, self_plan
from cocoa_pl.attention.rectangles import (
    CPU_CALL_COST,
    GPU_CALL_COST,
    MAX_SIZES,
    Integers,
    partition,
)

CONF = Path(__file__).parents[2] / "conf" / "attention"


def load_policy(file: Path) -> Policy:
    policy: Policy = instantiate(OmegaConf.load(file), _convert_="all")
    return policy


POLICIES = {file.stem: load_policy(file) for file in sorted(CONF.glob("*.yaml"))}
CALL_COSTS = [0, 10, 300, CPU_CALL_COST, GPU_CALL_COST]

Groups = Sequence[Integers]


def cost(groups: Groups, q: Integers, k: Integers, call_cost: int) -> int:
    return sum(len(g) * int(q[g].max()) * int(k[g].max()) + call_cost for g in groups)


def powers_of_two(q: Integers, k: Integers) -> Groups:
    """Both sides rounded up to a power of two."""
    sizes = [tuple(int(x - 1).bit_length() for x in pair) for pair in zip(q, k, strict=True)]
    return [np.array([i for i, s in enumerate(sizes) if s == size]) for size in set(sizes)]


def random_plan(policy: Policy, seed: int) -> Plan:
    """Skewed lengths: a few long samples among many short ones, some of them without a target."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 200, (), generator=generator))
    median = torch.tensor([300.0, 0.0, 40.0]) ** torch.rand(3, generator=generator)
    spread = 2 * torch.rand((), generator=generator)
    lengths = (torch.randn(samples, 3, generator=generator) * spread).exp() * median
    lengths = lengths.long().clamp(max=5000)
    lengths[:, 1] = 1
    return make_plan(policy, lengths)


def lengths_of(plan: Plan) -> tuple[Integers, Integers]:
    return plan.cu_seqlens_q.diff().long().numpy(), plan.cu_seqlens_k.diff().long().numpy()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_it_never_costs_more_than_one_group_or_one_for_each_power_of_two(
    seed: int, name: str
) -> None:
    q, k = lengths_of(random_plan(POLICIES[name], seed))
    for call_cost in CALL_COSTS:
        groups = partition(q, k, call_cost=call_cost)
        assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(len(q)))
        found = cost(groups, q, k, call_cost)
        assert found <= cost([np.arange(len(q))], q, k, call_cost)
        assert found <= cost(powers_of_two(q, k), q, k, call_cost)


def all_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in all_partitions(rest):
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [first, *group], *smaller[i + 1 :]]
        yield [[first], *smaller]


@pytest.mark.parametrize("call_cost", [0, 10, 100, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_it_costs_the_least_of_all_where_segments_see_themselves(seed: int, call_cost: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 40, size=8)
    least = min(
        cost([np.array(g) for g in groups], lengths, lengths, call_cost)
        for groups in all_partitions(list(range(8)))
    )
    found = cost(partition(lengths, lengths, call_cost=call_cost), lengths, lengths, call_cost)
    assert found == least


@pytest.mark.parametrize("seed", range(3))
def test_it_costs_nearly_the_least_of_all_under_the_bridge(seed: int) -> None:
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(1, 40, size=(3, 3)))
    lengths[:, 1] = 1
    q, k = lengths_of(make_plan(POLICIES["eos_bridge"], lengths))
    for call_cost in (10, 300):
        least = min(
            cost([np.array(g) for g in groups], q, k, call_cost)
            for groups in all_partitions(list(range(len(q))))
        )
        assert cost(partition(q, k, call_cost=call_cost), q, k, call_cost) <= 1.05 * least


def test_free_calls_pad_nothing_and_dear_ones_are_few() -> None:
    lengths = np.array([5, 3, 5, 900, 3, 17])
    assert cost(partition(lengths, lengths, call_cost=0), lengths, lengths, 0) == int(
        (lengths**2).sum()
    )
    assert len(partition(lengths, lengths, call_cost=1)) == 4  # equal segments share a call
    assert len(partition(lengths, lengths, call_cost=10**9)) == 1


def test_many_sizes_are_told_apart_by_eighths_of_an_octave() -> None:
    """The work of cutting does not grow with the square of the batch; padding stays small."""
    lengths = np.arange(1, 2000)
    groups = partition(lengths, lengths, call_cost=1)
    assert MAX_SIZES / 2 < len(groups) <= MAX_SIZES
    needed = int((lengths**2).sum())
    assert cost(groups, lengths, lengths, 0) < 1.2 * needed


def skewed(samples: int) -> torch.Tensor:
    """CONTEXT and TARGET lognormal with medians of 300 and 40."""
    generator = torch.Generator().manual_seed(0)
    median = torch.tensor([300.0, 0.0, 40.0])
    lengths = ((torch.randn(samples, 3, generator=generator) * 0.6).exp() * median).long() + 1
    lengths[:, 1] = 1
    return lengths


@pytest.mark.parametrize("name", POLICIES)
def test_skewed_lengths_are_padded_by_few_per_cent_and_not_one_by_one(name: str) -> None:
    lengths = skewed(64)
    plan = make_plan(POLICIES[name], lengths)
    rectangles = plan.padded.rectangles
    padded = sum(rectangle.scores for rectangle in rectangles)
    assert padded < 1.05 * plan.num_scores
    assert padded < len(lengths) * int(lengths.sum(1).max()) ** 2 / 3  # one batch, a dense mask
    assert len(rectangles) < 0.7 * len(plan.cu_seqlens_q)


def test_segments_of_equal_size_need_no_mask() -> None:
    (rectangle,) = self_plan(torch.tensor([4, 4, 4])).padded.rectangles
    assert (rectangle.segments, rectangle.queries, rectangle.keys) == (3, 4, 4)
    assert not rectangle.masked


def test_only_segments_of_other_numbers_of_keys_are_masked() -> None:
    (rectangle,) = self_plan(torch.tensor([4, 3, 4])).padded.rectangles
    assert rectangle.masked
    (mask,) = self_plan(torch.tensor([4, 3, 4])).padded.masks
    assert mask is not None
    assert mask.shape == (3, 1, 1, 4)
    assert sorted(mask[:, 0, 0].sum(1).tolist()) == [3, 4, 4]


def test_causal_rectangles_are_never_masked() -> None:
    plan = random_plan(POLICIES["causal"], 0)
    assert len(set(plan.cu_seqlens_q.diff().tolist())) > len(plan.padded.rectangles)  # some padded
    assert plan.padded.causal
    assert plan.padded.masks == [None] * len(plan.padded.rectangles)


def test_there_is_no_loop_over_segments() -> None:
    """Thousands of segments of a few sizes take as many operations as a few."""

    def operations(repeats: int) -> int:
        plan = self_plan(torch.tensor([64, 32, 16]).repeat(repeats))
        with Operations() as seen:
            assert [r.segments for r in plan.padded.rectangles] == [repeats] * 3
        return seen.count

    assert operations(1000) == operations(10) < 100


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
