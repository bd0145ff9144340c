"""Segment lengths in, the index arithmetic of one variable-length attention call out.

A policy splits every sample into at most three query segments; each has one list of keys.
EOS-bridged attention is
therefore three segments per sample, computed by a stock kernel: no dense mask, no padding, no
repeated heads.

    sample:  A A E B B            queries (A)   (E)       (B)
                                  keys    A A E A A E B B E B B
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cocoa_pl.attention.policy import Policy
from cocoa_pl.batch import ranges


@dataclass(frozen=True)
class Bucket:
    """Segments of similar size, padded together for kernels that want rectangles."""

    q_index: (
        Tensor  # (G, Lq) int64, token of each query slot; slots past the end repeat a real token
    )
    k_index: Tensor  # (G, Lk) int64
    mask: (
        Tensor | None
    )  # (G, 1, 1 or Lq, Lk) bool, True = seen; None where every slot is real and seen
    causal: bool  # only where mask is None


@dataclass(frozen=True)
class Gather:
    """Which rows of the packed keys and values the segments read, one after the other.

    A token is read by up to three segments (EOS under `eos_bridge`); the copies are listed by rank,
    so that no list names a token twice and the backward pass adds in one fixed order.
    """

    index: Tensor  # (K) int64, the token at each place
    first: Tensor  # (T) int64, the place of each token's first copy
    more: tuple[tuple[Tensor, Tensor], ...]  # tokens that have a next copy, and its places


@dataclass(frozen=True)
class Packed:
    """A plan as variable-length kernels want it: on the device, once for all layers."""

    cu_seqlens_q: Tensor  # (N + 1) int32
    cu_seqlens_k: Tensor  # (N + 1) int32
    max_q: int  # tokens of the longest segment
    max_k: int
    gather: Gather | None  # None where segments read the packed keys as they lie


@dataclass(frozen=True)
class Plan:
    """Query and key ranges of all segments of a packed row.

    Segment i attends from tokens `cu_seqlens_q[i]:cu_seqlens_q[i+1]` to the tokens
    `kv_index[cu_seqlens_k[i]:cu_seqlens_k[i+1]]`. All tensors are on the CPU until `.to`.
    """

    cu_seqlens_q: Tensor  # (N + 1) int32
    cu_seqlens_k: Tensor  # (N + 1) int32
    kv_index: Tensor  # (K) int64
    causal: bool
    device: torch.device

    def to(self, device: torch.device | str) -> Plan:
        """The same plan whose buckets and bounds are built for another device; the bookkeeping
        stays on the host.
        """
        return Plan(
            self.cu_seqlens_q, self.cu_seqlens_k, self.kv_index, self.causal, torch.device(device)
        )

    @property
    def num_scores(self) -> int:
        """Pairs of query and key that are really needed."""
        return int((self.cu_seqlens_q.diff().long() * self.cu_seqlens_k.diff().long()).sum())

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Segments grouped by size (both sides rounded up to a power of two), computed once for all
        layers.
        """
        return tuple(
            Bucket(
                on_device(b.q_index, self.device),
                on_device(b.k_index, self.device),
                None if b.mask is None else on_device(b.mask, self.device),
                b.causal,
            )
            for b in self._host_buckets
        )

    @cached_property
    def packed(self) -> Packed:
        """Bounds and the gather index for kernels that need no rectangles, computed once for all
        layers from what the host knows.
        """
        in_place = len(self.kv_index) == int(self.cu_seqlens_q[-1]) and torch.equal(
            self.kv_index, torch.arange(len(self.kv_index))
        )
        return Packed(
            cu_seqlens_q=on_device(self.cu_seqlens_q, self.device),
            cu_seqlens_k=on_device(self.cu_seqlens_k, self.device),
            max_q=int(self.cu_seqlens_q.diff().max()),
            max_k=int(self.cu_seqlens_k.diff().max()),
            gather=None if in_place else self._gather(),
        )

    def _gather(self) -> Gather:
        places = self.kv_index.argsort(stable=True)  # copies of a token side by side
        tokens = self.kv_index[places]
        starts = torch.cat([torch.ones(1, dtype=torch.bool), tokens.diff() != 0])
        # Every segment sees itself, so every token is read.
        begin = starts.nonzero()[:, 0]
        copy = torch.arange(len(tokens)) - begin[starts.cumsum(0) - 1]  # 0 for the first one
        ranks = range(1, int(copy.max()) + 1)
        return Gather(
            index=on_device(self.kv_index, self.device),
            first=on_device(places[copy == 0], self.device),
            more=tuple(
                (
                    on_device(tokens[copy == rank], self.device),
                    on_device(places[copy == rank], self.device),
                )
                for rank in ranks
            ),
        )

    @cached_property
    def _host_buckets(self) -> tuple[Bucket, ...]:
        q_lengths, k_lengths = self.cu_seqlens_q.diff().long(), self.cu_seqlens_k.diff().long()
        sizes = torch.stack([_power_of_two(q_lengths), _power_of_two(k_lengths)], dim=1)
        _, group = sizes.unique(dim=0, return_inverse=True)
        return tuple(
            self._bucket((group == g).nonzero()[:, 0], q_lengths, k_lengths)
            for g in range(int(group.max()) + 1)
        )

    @cached_property
    def restore_index(self) -> Tensor:
        """(T) int64: where each token's output lies in the concatenated, flattened buckets."""
        slots = torch.cat([b.q_index.flatten() for b in self._host_buckets])
        # A padding slot repeats the last token of its segment, right behind that token's own slot.
        real = torch.cat([torch.ones(1, dtype=torch.bool), slots.diff() != 0]).nonzero()[:, 0]
        restore = torch.empty_like(real)
        restore[slots[real]] = real
        return on_device(restore, self.device)

    def _bucket(self, members: Tensor, q_lengths: Tensor, k_lengths: Tensor) -> Bucket:
        q_size, k_size = q_lengths[members], k_lengths[members]
        q_slot, k_slot = torch.arange(int(q_size.max())), torch.arange(int(k_size.max()))
        q_index = self.cu_seqlens_q[members].long()[:, None] + q_slot.clamp(
            max=(q_size - 1)[:, None]
        )
        k_entry = self.cu_seqlens_k[members].long()[:, None] + k_slot.clamp(
            max=(k_size - 1)[:, None]
        )
        mask = None
        if len(k_size.unique()) > 1:
            mask = (k_slot < k_size[:, None])[:, None, None, :]  # (G, 1, 1, Lk)
            if self.causal:
                mask = mask & (k_slot <= q_slot[:, None])  # (G, 1, Lq, Lk)
        return Bucket(
            q_index=q_index,
            k_index=self.kv_index[k_entry],
            mask=mask,
            causal=self.causal and mask is None,
        )


def make_plan(policy: Policy, segment_lengths: Tensor) -> Plan:
    """Turn a policy and the packed segments into query and key ranges.

    Neighbouring segments that see the same columns are one query segment, so `bidirectional` is one
    per sample.

    Args:
        segment_lengths: (S, 3) int64 on the CPU.
    """
    table = policy.table
    offsets = (
        segment_lengths.flatten().cumsum(0).view(-1, 3) - segment_lengths
    )  # (S, 3) first token
    merged = _merge_equal_rows(table.tolist())
    q_lengths = torch.stack([segment_lengths[:, rows].sum(1) for rows in merged], dim=1)  # (S, R)
    seen = torch.stack([table[rows[0]] for rows in merged])  # (R, 3)
    k_parts = segment_lengths[:, None, :] * seen  # (S, R, 3) tokens of each key range
    keep = q_lengths.flatten() > 0
    q_lengths, k_parts = q_lengths.flatten()[keep], k_parts.flatten(0, 1)[keep]
    starts = offsets[:, None, :].expand(-1, len(merged), -1).flatten(0, 1)[keep]
    return Plan(
        cu_seqlens_q=_cumulative(q_lengths),
        cu_seqlens_k=_cumulative(k_parts.sum(1)),
        kv_index=ranges(starts.flatten(), k_parts.flatten()),
        causal=policy.causal,
        device=torch.device("cpu"),
    )


def self_plan(lengths: Tensor) -> Plan:
    """Every segment attends to itself: the vision tower's images.

    Args:
        lengths: (N) int64 on the CPU.
    """
    cumulative = _cumulative(lengths)
    everything = torch.arange(int(lengths.sum()))
    return Plan(cumulative, cumulative, everything, False, torch.device("cpu"))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on another device, without waiting for it: from pinned memory, the copy takes
    its turn behind the work that is queued there.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _merge_equal_rows(table: list[list[bool]]) -> list[list[int]]:
    merged = [[0]]
    for row in range(1, len(table)):
        if table[row] == table[row - 1]:
            merged[-1].append(row)
        else:
            merged.append([row])
    return merged


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _power_of_two(lengths: Tensor) -> Tensor:
    return 2 ** torch.ceil(torch.log2(lengths.double())).long()
