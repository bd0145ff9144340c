"""Exact counts of what a function computes and keeps: the same on any machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

Run = Callable[[], object]


@dataclass(frozen=True)
class Count:
    """One quantity on both sides."""

    peer: float
    ours: float

    @property
    def ratio(self) -> float | None:
        """How many times as much the peer has; None where ours has none."""
        return self.peer / self.ours if self.ours else None


Counts = dict[str, Count]


@dataclass(frozen=True)
class Cost:
    """What one call computes and keeps.

    Attributes:
        flops: floating-point operations of matrix products and attention, forward and backward.
        peak_saved_bytes: the most that graphs keep for backward passes at any time, each storage
            counted once.
        peak_bytes: the most memory that tensors made during the call take at any time.
    """

    flops: int
    peak_saved_bytes: int
    peak_bytes: int


def torch_counts(
    peer: Run, ours: Run, *, device: torch.device, parameters: Iterable[Tensor] = ()
) -> Counts:
    """Operations and memory of two functions that compute with torch.

    Args:
        parameters: weights and inputs; a graph keeps them without a cost of its own.
    """
    kept = list(parameters)
    costs = [cost_of(run, device=device, parameters=kept) for run in (peer, ours)]
    return {
        name: Count(*(getattr(cost, name) for cost in costs))
        for name in ("flops", "peak_saved_bytes", "peak_bytes")
    }


def cost_of(run: Run, *, device: torch.device, parameters: Iterable[Tensor] = ()) -> Cost:
    """Count everything in one call."""
    ignored = {_address(parameter) for parameter in parameters}
    saved, live = _Saved(), LiveBytes()
    flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    flops.mod_tracker = cast(Any, _NoModules())

    def pack(tensor: Tensor) -> _Held:
        return _Held(tensor, None if _address(tensor) in ignored else saved)

    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with (
        saved_tensors_hooks(pack, lambda held: held.tensor),
        flops,
        nullcontext() if cuda else live,
    ):
        run()
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else live.peak
    return Cost(int(flops.get_total_flops()), saved.peak, peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations within it make, as long as they live; for
    devices whose allocator does not say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen.setdefault(tensor.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


class _Saved:
    """Storages that graphs hold, with the number of tensors that hold each."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.bytes = 0
        self.peak = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        self.holders[address] = self.holders.get(address, 0) + 1
        if self.holders[address] == 1:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def remove(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.bytes -= size


class _Held:
    """A saved tensor; when the graph lets it go, its storage is no longer counted."""

    def __init__(self, tensor: Tensor, saved: _Saved | None) -> None:
        self.tensor = tensor.detach()  # an output would hold its own graph, and that this, for ever
        if saved is not None:
            storage = tensor.untyped_storage()
            saved.add(storage)
            weakref.finalize(self, saved.remove, storage.data_ptr(), storage.nbytes())


class _NoModules(nullcontext[None]):
    """In place of torch's tracker, whose hooks keep recomputed graphs until the count ends."""

    parents = frozenset({"Global"})


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# torch does not count attention on the CPU, nor before 2.13 that of packed segments. Each of two
# products is 2 x queries x keys x width.
def _attention(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def _attention_backward(
    _: torch.Size, query: torch.Size, key: torch.Size, *__: Any, **___: Any
) -> int:
    return _attention(query, key) * 5 // 2  # scores again, and gradients of v, scores, q and k


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    scores = (bounds_q.diff().long() * bounds_k.diff()).sum()
    return 4 * int(scores) * query.shape[1] * query.shape[2]


def _packed_backward(
    _: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *bounds: Any, **__: Any
) -> int:
    return _packed(q, k, v, *bounds) * 5 // 2


# To FlopCounterMode: give it tensors, not their shapes.
_packed._get_raw = _packed_backward._get_raw = True  # type: ignore[attr-defined]

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.torch_attn._varlen_attn: _packed,
    torch.ops.torch_attn._varlen_attn_backward: _packed_backward,
}
