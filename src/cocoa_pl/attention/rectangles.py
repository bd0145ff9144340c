"""Segment lengths in, the padded rectangles that compute them with few scores out.

Segments that are padded to one size are one call; every call costs something by itself. The best
way to cut segments, sorted by size, into groups is found by dynamic programming over the distinct
sizes. No group for each power of two, and no single group of all, ever costs less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cocoa_pl.attention.gather import Gather, make_gather, on_device
from cocoa_pl.batch import ranges

# What a call costs beside its scores, in scores of all heads. On one core (AVX2, float32, 4 to 12
# heads of 32 to 128) 400 to 2,300 were measured, forward and backward; more where several threads
# meet in every call, up to 100,000 on busy cores. For lengths as in docs/speed.md padding is still
# within 2 % of what is needed. Elsewhere launching costs: chosen for few calls, not measured.
CPU_CALL_COST, GPU_CALL_COST = 2**12, 2**18
MAX_SIZES = 128  # more distinct sizes are told apart by eighths of an octave only

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Rectangle:
    """Segments padded to one size: one attention call."""

    segments: int
    queries: int
    keys: int
    masked: bool  # keys of padding must be hidden from real queries

    @property
    def scores(self) -> int:
        return self.segments * self.queries * self.keys


@dataclass(frozen=True)
class Padded:
    """A plan as kernels want it that know rectangles only; these lie end to end."""

    rectangles: tuple[Rectangle, ...]
    q: Gather  # from tokens to the query places of all rectangles
    k: Gather  # to the key places
    k_real: Tensor  # bool, for each key place whether it is no padding
    causal: bool  # a query sees the keys up to its own place

    @property
    def masks(self) -> list[Tensor | None]:
        """(G, 1, 1, Lk) bool of each rectangle, True = seen; None where nothing need be hidden."""
        real = self.k_real.split([r.segments * r.keys for r in self.rectangles])
        return [
            part.view(r.segments, 1, 1, r.keys) if r.masked else None
            for r, part in zip(self.rectangles, real, strict=True)
        ]

    def to(self, device: torch.device) -> Padded:
        real = on_device(self.k_real, device)
        return replace(self, q=self.q.to(device), k=self.k.to(device), k_real=real)

    def pin_memory(self) -> Padded:
        real = self.k_real.pin_memory()
        return replace(self, q=self.q.pin_memory(), k=self.k.pin_memory(), k_real=real)


def pad(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_index: Tensor, *, causal: bool, call_cost: int
) -> Padded:
    """Lay segments into rectangles.

    Args:
        cu_seqlens_q, cu_seqlens_k, kv_index, causal: as for `Plan`.
        call_cost: of a rectangle beside its scores, in scores.
    """
    q_lengths, k_lengths = (bounds.diff().long().numpy() for bounds in (cu_seqlens_q, cu_seqlens_k))
    assert not causal or np.array_equal(q_lengths, k_lengths)
    groups = partition(q_lengths, k_lengths, call_cost=call_cost)
    order, counts = np.concatenate(groups), np.array([len(group) for group in groups])
    starts = counts.cumsum() - counts
    q_sides, k_sides = (np.maximum.reduceat(x[order], starts) for x in (q_lengths, k_lengths))
    # Behind a causal segment's end there is nothing that its own queries see.
    unequal = np.minimum.reduceat(k_lengths[order], starts) < k_sides
    masked = unequal & (not causal)
    q_index, q_real = _places(cu_seqlens_q, order, np.repeat(q_sides, counts))
    k_entry, k_real = _places(cu_seqlens_k, order, np.repeat(k_sides, counts))
    shapes = (counts.tolist(), q_sides.tolist(), k_sides.tolist(), masked.tolist())
    return Padded(
        tuple(map(Rectangle, *shapes)),
        make_gather(q_index, q_real),
        make_gather(kv_index[k_entry], k_real),
        k_real,
        causal,
    )


def partition(q_lengths: Integers, k_lengths: Integers, *, call_cost: int) -> list[Integers]:
    """Cut segments into groups so that padded scores plus `call_cost` a group are few.

    The fewest where segments can be sorted by both sides at once and have at most `MAX_SIZES`
    sizes; nearly so elsewhere.

    Args:
        q_lengths, k_lengths: (N), at least 1.

    Returns:
        The segments of each group.
    """
    order, starts = _sizes(q_lengths, k_lengths)
    q_side = np.maximum.reduceat(q_lengths[order], starts)
    k_side = np.maximum.reduceat(k_lengths[order], starts)
    counts = np.diff(starts, append=len(order))
    # (B, B) of sizes first..last, in the upper triangle.
    members = np.cumsum(counts) - (np.cumsum(counts) - counts)[:, None]
    upper = np.tri(len(counts), dtype=bool).T
    sides = [np.maximum.accumulate(np.where(upper, side, 0), axis=1) for side in (q_side, k_side)]
    costs = np.where(upper, members * sides[0] * sides[1] + call_cost, np.iinfo(np.int64).max // 2)
    best = np.zeros(len(counts) + 1, dtype=np.int64)  # of the sizes before this one
    cut = np.zeros(len(counts), dtype=np.int64)  # where the group begins that ends with this size
    for last in range(len(counts)):
        through = best[: last + 1] + costs[: last + 1, last]
        cut[last] = through.argmin()
        best[last + 1] = through[cut[last]]
    bounds = [len(counts)]
    while bounds[-1]:
        bounds.append(int(cut[bounds[-1] - 1]))
    return np.split(order, starts[bounds[-2:0:-1]])


def _sizes(q_lengths: Integers, k_lengths: Integers) -> tuple[Integers, Integers]:
    """Segments sorted by size, and where each size begins among them.

    Octaves are sorted first, so that every group for a power of two is one piece.
    """
    sides = np.stack([k_lengths, q_lengths])
    octaves = np.frexp(sides - 1)[1]  # of a power of two and what is above the one before
    order, starts = _runs(np.concatenate([sides, octaves]))
    if len(starts) > MAX_SIZES:
        eighths = (sides - 1) >> np.maximum(octaves - 4, 0)
        order, starts = _runs(np.concatenate([eighths, octaves]))
    return order, starts


def _runs(keys: Integers) -> tuple[Integers, Integers]:
    """(R, N), the last row is the first to sort by -> the order, and where equal columns begin."""
    order = np.lexsort(keys)
    changes = (np.diff(keys[:, order], axis=1) != 0).any(0)
    return order, np.concatenate([[0], changes.nonzero()[0] + 1])


def _places(bounds: Tensor, order: Integers, padded: Integers) -> tuple[Tensor, Tensor]:
    """Entries of segments in an order, each padded to a length; and which of them are real.

    Padding repeats a segment's last entry.
    """
    segments, lengths = torch.from_numpy(order), torch.from_numpy(padded)
    place = ranges(torch.zeros_like(lengths), lengths)
    first, last = bounds[:-1].long()[segments], bounds[1:].long()[segments] - 1
    entry = place + torch.repeat_interleave(first, lengths)
    last = torch.repeat_interleave(last, lengths)
    return entry.minimum(last), entry <= last
