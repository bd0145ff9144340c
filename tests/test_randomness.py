"""Pure, uniform, normal, independent: of every other seed, counter and stream."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cocoa_pl.randomness import mix, normal, uniform

N = 200_000
COUNTERS = torch.arange(N)
SEED = torch.tensor(mix(7))


def finalise(x: int) -> int:
    """SplitMix64's finaliser on unsigned Python integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def slow_uniform(seed: int, counter: int, stream: int) -> float:
    state = finalise((seed + mix(stream)) % 2**64)
    state = finalise(state ^ (counter * 0x9E3779B97F4A7C15 % 2**64))
    return (state >> 40) / 2**24


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])


def test_mix_folds_any_integers_into_63_bits() -> None:
    values = [mix(), mix(0), mix(0, 0), mix(1), mix(-1), mix(2**63), mix(1, 2), mix(2, 1)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)


def test_mix_of_one_value_is_splitmix64() -> None:
    # The first output of SplitMix64 seeded with 0 is 0xE220A8397B1DCDAF (its reference code).
    assert mix(0) == 0xE220A8397B1DCDAF >> 1


def test_mix_of_neighbouring_rows_and_epochs_never_collides() -> None:
    assert len({mix(3, epoch, row) for epoch in range(50) for row in range(1000)}) == 50_000


@pytest.mark.parametrize("stream", [0, 1, 2, 77])
def test_uniform_equals_its_slow_twin(stream: int) -> None:
    seeds = [0, 1, mix(5), 2**63 - 1]
    counters = [0, 1, 2, 1000, 2**40]
    got = uniform(torch.tensor(seeds)[:, None], torch.tensor(counters), stream=stream)
    expected = torch.tensor([[slow_uniform(s, c, stream) for c in counters] for s in seeds])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_numbers_are_a_pure_function_of_seed_counter_and_stream(
    draw: Callable[..., Tensor],
) -> None:
    seeds = torch.tensor([mix(i) for i in range(50)])
    counters = torch.arange(40)
    whole = draw(seeds[:, None], counters, stream=3)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(draw(seeds[:, None], counters, stream=3), whole)
    order = torch.randperm(50)
    assert torch.equal(draw(seeds[order][:, None], counters, stream=3), whole[order])
    assert torch.equal(draw(seeds[7], counters[11], stream=3), whole[7, 11])


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniform(SEED, COUNTERS, stream=1)
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    chi_square = float(((counts - N / 100) ** 2 / (N / 100)).sum())
    assert chi_square < 149  # 99.9 % quantile at 99 degrees of freedom
    assert abs(float(numbers.double().mean()) - 0.5) < 4 / math.sqrt(12 * N)


def test_normal_numbers_are_standard_normal() -> None:
    numbers = normal(SEED, COUNTERS, stream=1).double()
    assert torch.isfinite(numbers).all()
    assert abs(float(numbers.mean())) < 4 / math.sqrt(N)
    assert abs(float(numbers.var()) - 1) < 4 * math.sqrt(2 / N)
    assert abs(float((numbers**4).mean()) - 3) < 4 * math.sqrt(96 / N)
    ranks = torch.special.ndtr(numbers.sort().values)
    uniform_ranks = (torch.arange(N) + 0.5) / N
    assert float((ranks - uniform_ranks).abs().max()) < 1.95 / math.sqrt(N)  # Kolmogorov, 99.9 %


@pytest.mark.parametrize("draw", [uniform, normal])
def test_neighbouring_seeds_counters_and_streams_are_uncorrelated(
    draw: Callable[..., Tensor],
) -> None:
    numbers = draw(SEED, COUNTERS, stream=1)
    others = {
        "next counter": numbers.roll(1),
        "next seed": draw(SEED + 1, COUNTERS, stream=1),
        "next stream": draw(SEED, COUNTERS, stream=2),
        "seed and counter swapped": draw(COUNTERS, SEED, stream=1),
    }
    for name, other in others.items():
        assert abs(correlation(numbers, other)) < 4 / math.sqrt(N), name
    over_seeds = draw(COUNTERS, torch.tensor(0), stream=1)
    assert abs(correlation(over_seeds, over_seeds.roll(1))) < 4 / math.sqrt(N)
