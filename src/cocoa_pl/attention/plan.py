"""A plan is the index arithmetic of one attention call over packed samples, made on the host.

A policy splits every sample into at most three query segments; each has one list of keys.
EOS-bridged attention is therefore three segments a sample, computed by a stock kernel: no dense
mask, no repeated heads.

    sample:  A A E B B            queries (A)   (E)       (B)
                                  keys    A A E A A E B B E B B
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.functional import pad

from cocoa_pl.attention.policy import Policy


class Rectangle(NamedTuple):
    """Segments of similar size, padded to the longest: one attention call."""

    segments: int
    queries: int
    keys: int

    @property
    def scores(self) -> int:
        return self.segments * self.queries * self.keys


class Padded(NamedTuple):
    """A plan for kernels that compute rectangles, which lie end to end.

    Padding repeats the last token of a segment. An index of None stands for the rows as they lie.
    """

    rectangles: tuple[Rectangle, ...]
    masks: tuple[Tensor | None, ...]  # (G, 1, 1 or Lq, Lk) bool, True = seen; None: nothing to hide
    q_index: Tensor | None  # int64, the token at each query place
    k_index: Tensor | None  # int64, the token at each key place
    place: Tensor | None  # (T) int64, the query place of each token


class Plan(NamedTuple):
    """Query and key ranges of all segments of a packed row, as variable-length kernels read them.

    Segment i attends from tokens `cu_seqlens_q[i]:cu_seqlens_q[i + 1]` to the tokens
    `kv_index[cu_seqlens_k[i]:cu_seqlens_k[i + 1]]`. A plan is made on the host, and moves once for
    all layers.
    """

    cu_seqlens_q: Tensor  # (N + 1) int32
    cu_seqlens_k: Tensor  # (N + 1) int32
    max_q: int  # tokens of the longest segment
    max_k: int
    kv_index: Tensor | None  # (K) int64; None for the rows as they lie
    causal: bool  # query i of a segment with Lq queries and Lk keys sees key j <= i + Lk - Lq
    padded: Padded | None = None  # for `sdpa`, which reads nothing else; see `prepared`

    def to(self, device: torch.device | str) -> Plan:
        """The same plan for kernels on another device."""
        return Plan(*apply_to_collection(self, Tensor, on_device, torch.device(device)))

    @property
    def num_scores(self) -> int:
        """Pairs of a query and a key of its segment."""
        return int((self.cu_seqlens_q.diff().long() * self.cu_seqlens_k.diff().long()).sum())

    def prepared(self, kernel: str) -> Plan:
        """The same plan, on the host, with what a kernel reads: `sdpa` needs `padded`.

        Segments whose queries and keys are alike to a factor of two share a rectangle. One
        rectangle for each row of the policy would be less code, and made attention of skewed
        lengths twice as slow: 1.8 to 2.5 times the scores that are needed, where these are 1.2 to
        1.6 times as many.

        Args:
            kernel: as `kernels.chosen` names it.
        """
        if kernel != "sdpa":
            return self
        q_starts, k_starts = self.cu_seqlens_q[:-1].long(), self.cu_seqlens_k[:-1].long()
        q_lengths, k_lengths = self.cu_seqlens_q.diff().long(), self.cu_seqlens_k.diff().long()
        octaves = torch.stack([q_lengths, k_lengths]).double().log2().ceil()  # (2, N)
        kinds, kind = octaves.unique(dim=1, return_inverse=True)
        rectangles, masks, queries, keys, num_places = [], [], [], [], 0
        first_places = torch.empty_like(q_lengths)
        for number in range(kinds.shape[1]):
            own = (kind == number).nonzero()[:, 0]
            q_entries = _padded_ranges(q_starts[own], q_lengths[own])  # (G, Lq)
            k_entries = _padded_ranges(k_starts[own], k_lengths[own])  # (G, Lk)
            rectangle = Rectangle(len(own), q_entries.shape[1], k_entries.shape[1])
            rectangles.append(rectangle)
            masks.append(_mask(rectangle, q_lengths[own], k_lengths[own], causal=self.causal))
            queries.append(q_entries.flatten())
            keys.append(k_entries.flatten())
            first_places[own] = num_places + torch.arange(len(own)) * rectangle.queries
            num_places += q_entries.numel()
        tokens, k_index = int(self.cu_seqlens_q[-1]), torch.cat(keys)
        padded = Padded(
            tuple(rectangles),
            tuple(masks),
            _unless_in_place(torch.cat(queries), tokens),
            _unless_in_place(k_index if self.kv_index is None else self.kv_index[k_index], tokens),
            _unless_in_place(_ranges(first_places, q_lengths), num_places),
        )
        return self._replace(padded=padded)


def make_plan(policy: Policy, segment_lengths: Tensor) -> Plan:
    """Turn a policy and the packed segments into query and key ranges.

    Neighbouring segments that see the same columns are one query segment, so `bidirectional` is one
    per sample, and so is `causal`. Where the policy is causal, keys end with the queries' own
    tokens: nothing behind a segment is seen.

    Args:
        segment_lengths: (S, 3) int64 on the CPU.
    """
    table = policy.table.tril() if policy.causal else policy.table
    merged = [[0]]  # rows of the table that are one query segment
    for after in (1, 2):
        columns = after if policy.causal else 3  # where two rows may differ
        if table[after, :columns].equal(table[after - 1, :columns]):
            merged[-1].append(after)
        else:
            merged.append([after])
    starts = segment_lengths.flatten().cumsum(0).view(-1, 3) - segment_lengths  # (S, 3) first token
    q_lengths = torch.stack([segment_lengths[:, rows].sum(1) for rows in merged], dim=1)  # (S, R)
    seen = torch.stack([table[rows[-1]] for rows in merged])  # (R, 3)
    sample, row = q_lengths.nonzero(as_tuple=True)  # of the N segments that are not empty
    k_parts = segment_lengths[sample] * seen[row]  # (N, 3) tokens of each key range
    queries, keys = q_lengths[sample, row], k_parts.sum(1)  # (N) tokens
    index = _ranges(starts[sample].flatten(), k_parts.flatten())
    return Plan(
        _cumulative(queries),
        _cumulative(keys),
        int(queries.max()),
        int(keys.max()),
        _unless_in_place(index, int(queries.sum())),
        policy.causal,
    )


def self_plan(lengths: Tensor) -> Plan:
    """Every segment attends to itself: the vision tower's images.

    Args:
        lengths: (N) int64 on the CPU.
    """
    bounds, longest = _cumulative(lengths), int(lengths.max())
    return Plan(bounds, bounds, longest, longest, None, causal=False)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on another device, without waiting for it: from pinned memory, the copy takes
    its turn behind the work that is queued there.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def _cumulative(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0), (1, 0)).int()


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated arange(start, start + length) for each pair: (N), (N) -> (sum of lengths)."""
    ends = lengths.cumsum(0)
    within = torch.arange(int(lengths.sum())) - torch.repeat_interleave(ends - lengths, lengths)
    return torch.repeat_interleave(starts, lengths) + within


def _padded_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Ranges as rows of one length, which repeat their last entry: (G), (G) -> (G, L)."""
    return starts[:, None] + torch.arange(int(lengths.max())).minimum(lengths[:, None] - 1)


def _mask(r: Rectangle, q_lengths: Tensor, k_lengths: Tensor, *, causal: bool) -> Tensor | None:
    if not causal:
        whole = bool((k_lengths == r.keys).all())
        return None if whole else (torch.arange(r.keys) < k_lengths[:, None])[:, None, None]
    if q_lengths.equal(k_lengths):
        return None  # what lies behind a segment's end is hidden by causality
    last = torch.arange(r.queries) + (k_lengths - q_lengths)[:, None]  # (G, Lq) key that is seen
    return (torch.arange(r.keys) <= last[..., None])[:, None]


def _unless_in_place(index: Tensor, rows: int) -> Tensor | None:
    in_place = len(index) == rows and torch.equal(index, torch.arange(rows))
    return None if in_place else index
