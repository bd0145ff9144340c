"""Seeds and counters in, random numbers out, without any state.

What is hidden in a sample is a pure function of (its seed, the position inside the sample). So it
does not depend on packing, on the number of workers or ranks, or on what was drawn before, and a
resumed run needs no saved generator. The mixing function is the finaliser of SplitMix64 (Steele,
Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195).
"""

import math

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def mix(*values: int) -> int:
    """Fold integers into one 63-bit seed, e.g. `mix(run_seed, epoch, row)`."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def uniform(seeds: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Independent uniform numbers in [0, 1), one for each (seed, counter) under broadcasting.

    Args:
        seeds: int64.
        counters: int64, broadcastable to `seeds`.
        stream: separates uses of the same seed and counter (text, patches, ...).

    Returns:
        float32 with 24 random bits.
    """
    state = _finalise(seeds + _signed(mix(stream)))
    state = _finalise(state ^ (counters * _signed(0x9E3779B97F4A7C15)))
    return _shift(state, 40).to(torch.float32) / (1 << 24)


def normal(seeds: Tensor, counters: Tensor, *, stream: int) -> Tensor:
    """Independent standard normal numbers in float32, by the Box-Muller transform."""
    radius = torch.sqrt(-2 * torch.log1p(-uniform(seeds, counters, stream=2 * stream)))
    angle = 2 * math.pi * uniform(seeds, counters, stream=2 * stream + 1)
    return radius * torch.cos(angle)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own repeats the sign bit of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
