"""Segment lengths in, the index arithmetic of one variable-length attention call out.

A policy splits every sample into at most three query segments; each has one list of keys.
EOS-bridged attention is therefore three segments per sample, computed by a stock kernel: no dense
mask, no padding, no repeated heads.

    sample:  A A E B B            queries (A)   (E)       (B)
                                  keys    A A E A A E B B E B B
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cocoa_pl.attention.gather import Gather, make_gather, on_device
from cocoa_pl.attention.policy import Policy
from cocoa_pl.attention.rectangles import CPU_CALL_COST, GPU_CALL_COST, Padded, Rectangle, pad
from cocoa_pl.batch import ranges


@dataclass(frozen=True)
class Packed:
    """A plan as variable-length kernels want it."""

    cu_seqlens_q: Tensor  # (N + 1) int32
    cu_seqlens_k: Tensor  # (N + 1) int32
    max_q: int  # tokens of the longest segment
    max_k: int
    gather: Gather  # from tokens to the keys and values of all segments, end to end

    def to(self, device: torch.device) -> Packed:
        q, k = on_device(self.cu_seqlens_q, device), on_device(self.cu_seqlens_k, device)
        return Packed(q, k, self.max_q, self.max_k, self.gather.to(device))

    def pin_memory(self) -> Packed:
        q, k = self.cu_seqlens_q.pin_memory(), self.cu_seqlens_k.pin_memory()
        return Packed(q, k, self.max_q, self.max_k, self.gather.pin_memory())


@dataclass(frozen=True)
class Plan:
    """Query and key ranges of all segments of a packed row.

    Segment i attends from tokens `cu_seqlens_q[i]:cu_seqlens_q[i+1]` to the tokens
    `kv_index[cu_seqlens_k[i]:cu_seqlens_k[i+1]]`. These stay on the host. What kernels read is made
    of them in one of two forms, ahead of time by `prepared` or when it is first asked for, and is
    moved once for all layers.
    """

    cu_seqlens_q: Tensor  # (N + 1) int32
    cu_seqlens_k: Tensor  # (N + 1) int32
    kv_index: Tensor  # (K) int64
    causal: bool
    device: torch.device  # where kernels read it
    host_padded: Padded | None = None  # what is prepared
    host_packed: Packed | None = None

    def to(self, device: torch.device | str) -> Plan:
        """The same plan for kernels on another device; what is prepared stays so."""
        return replace(self, device=torch.device(device))

    def prepared(self, kernel: str) -> Plan:
        """The same plan with what a kernel reads made already, by a worker instead of in the step.

        It travels with the plan: through pickle, `to` and `pin_memory`. How rectangles are cut
        depends on the kind of device, so name that first: `plan.to("cuda").prepared("sdpa")` needs
        no such device.

        Args:
            kernel: `sdpa`, `varlen` or `flash`; `kernels.chosen` tells which one `auto` is.

        Raises:
            ValueError: for another name.
        """
        if kernel == "sdpa":
            return replace(self, host_padded=self._padded_on_host)
        if kernel in ("varlen", "flash"):
            return replace(self, host_packed=self._packed_on_host)
        raise ValueError(f"cannot prepare a plan for attention kernel {kernel!r}")

    def pin_memory(self) -> Plan:
        """The same plan with what is prepared in pinned memory, from where nothing waits for it."""
        padded, packed = self.host_padded, self.host_packed
        return replace(
            self,
            host_padded=None if padded is None else padded.pin_memory(),
            host_packed=None if packed is None else packed.pin_memory(),
        )

    @property
    def num_scores(self) -> int:
        """Pairs of query and key that are really needed."""
        return int((self.cu_seqlens_q.diff().long() * self.cu_seqlens_k.diff().long()).sum())

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """What `sdpa` computes for this plan, known on the host."""
        return self._padded_on_host.rectangles

    @cached_property
    def padded(self) -> Padded:
        """For kernels that compute rectangles, on the plan's device."""
        return self._padded_on_host.to(self.device)

    @cached_property
    def packed(self) -> Packed:
        """For kernels that need no rectangles, on the plan's device."""
        return self._packed_on_host.to(self.device)

    @cached_property
    def _padded_on_host(self) -> Padded:
        if self.host_padded is not None:
            return self.host_padded
        return pad(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.kv_index,
            causal=self.causal,
            call_cost=CPU_CALL_COST if self.device.type == "cpu" else GPU_CALL_COST,
        )

    @cached_property
    def _packed_on_host(self) -> Packed:
        if self.host_packed is not None:
            return self.host_packed
        return Packed(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            max_q=int(self.cu_seqlens_q.diff().max()),
            max_k=int(self.cu_seqlens_k.diff().max()),
            gather=make_gather(self.kv_index, torch.ones(len(self.kv_index), dtype=torch.bool)),
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
