"""What a run computes, reads, writes and keeps, counted operation by operation; the same on any
machine, and on tensors without values.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

ACTIVATIONS = "activations"  # what nobody has said another kind of
# Attribute of a tensor without values: what they would be, an array. The cost of attention over
# packed segments follows from them.
HOST_VALUES = "host_values"
aten, varlen = torch.ops.aten, torch.ops.torch_attn

# Of several operations, which come one by one unless in inference mode.
WHOLE = {aten.linear, aten.matmul, aten.scaled_dot_product_attention, aten.conv3d}
# They make no kernel run, although their schemas do not say so.
FREE = {aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
READ_IN_PART = {aten.index_select, aten.embedding, aten.gather}  # as much as they write
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_, aten.normal_, aten.uniform_}


class Call(NamedTuple):
    """One operation.

    Attributes:
        dtype: of its first tensor, which matrix products compute in.
        flops: of matrix products and attention, two for each multiplication and addition.
        bytes: of its inputs and outputs, each read or written once.
    """

    operator: str
    dtype: str
    flops: int
    bytes: int


class Cost(NamedTuple):
    """Of some operations; a kernel is an operation that is no view."""

    flops: int
    bytes: int
    kernels: int


@dataclass(frozen=True)
class Count:
    """What a run did.

    Attributes:
        calls: how often each operation ran.
        peak: bytes by kind at the moment when most were alive, of tensors that the run made and of
            those that it was told to hold.
        highest: the most that ACTIVATIONS alone ever were.
    """

    calls: Counter[Call]
    peak: Mapping[str, int]
    highest: int

    @property
    def total(self) -> Cost:
        costs = self.by_operator().values()
        return Cost(*(sum(column) for column in zip(*costs, strict=True)))

    def by_operator(self) -> dict[str, Cost]:
        """Costs of all calls of each operator, such as `aten.mm`."""
        found: dict[str, Cost] = {}
        for call, times in self.calls.items():
            flops, moved, kernels = found.get(call.operator, Cost(0, 0, 0))
            found[call.operator] = Cost(
                flops + times * call.flops, moved + times * call.bytes, kernels + times
            )
        return found

    def seconds(self, tflops: Mapping[str, float], bandwidth: float) -> float:
        """The least that the operations take one after the other: each computes at its type's peak
        and moves its bytes at the memory's, whichever takes longer.

        Args:
            tflops: peaks by type, `bfloat16` and `float32`, in 10^12 operations a second.
            bandwidth: in 10^12 bytes a second.
        """
        total = 0.0
        for call, times in self.calls.items():
            peak = tflops.get(call.dtype, tflops["float32"])
            total += times * max(call.flops / peak, call.bytes / bandwidth)
        return total / 1e12


def count(run: Callable[[], object]) -> Count:
    """Count everything in one call of a function."""
    with Counting() as counting:
        run()
    return counting.result


class Counting(TorchDispatchMode):
    """Counts the operations within it, and the storages that they make as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.alive: Counter[str] = Counter()  # bytes by kind
        self.now = self.peak = self.highest = 0
        self.at_peak: dict[str, int] = {}
        self._entries: Any = WeakIdKeyDictionary()  # storage -> [kind, bytes]

    @property
    def result(self) -> Count:
        return Count(self.calls, self.at_peak, self.highest)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func._overloadpacket in WHOLE:
            with self:  # in inference mode a layer's operator comes whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        known = {id(tensor.untyped_storage()) for tensor in inputs}
        for tensor in outputs:
            if id(tensor.untyped_storage()) not in known:
                self._add(tensor.untyped_storage(), ACTIVATIONS)
        self.rise_by(0)
        if not _is_free(func):
            moved = _bytes_moved(func, args, kwargs, inputs, outputs)
            flops = int(_flops(func, args, kwargs, result))
            dtype = str(inputs[0].dtype if inputs else outputs[0].dtype if outputs else "")
            name = str(func._overloadpacket)
            self.calls[Call(name, dtype.removeprefix("torch."), flops, moved)] += 1
        return result

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say of which kind tensors are, those made before the run included."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            entry = self._entries.get(storage)
            if entry is None:
                self._add(storage, kind)
            else:
                self.alive[entry[0]] -= entry[1]
                self.alive[kind] += entry[1]
                entry[0] = kind

    def rise_by(self, extra: int) -> None:
        """Note that for a moment this many bytes more were alive, of ACTIVATIONS."""
        self.highest = max(self.highest, self.alive[ACTIVATIONS] + extra)
        if self.now + extra > self.peak:
            self.peak = self.now + extra
            self.at_peak = {kind: size for kind, size in self.alive.items() if size}
            self.at_peak[ACTIVATIONS] = self.alive[ACTIVATIONS] + extra

    def repeat(self, calls: Mapping[Call, int], rise: int) -> None:
        """Count operations that were counted before, which for a moment took so many bytes more."""
        self.calls.update(calls)
        self.rise_by(rise)

    def _add(self, storage: Any, kind: str) -> None:
        if storage in self._entries:
            return
        entry = [kind, storage.nbytes()]
        self._entries[storage] = entry
        self.alive[kind] += entry[1]
        self.now += entry[1]
        weakref.finalize(storage, self._free, entry).atexit = False

    def _free(self, entry: list[Any]) -> None:
        self.alive[entry[0]] -= entry[1]
        self.now -= entry[1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_free(func: Any) -> bool:
    """Views, and what only asks for memory."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = aliases and all(alias is not None and not alias.is_write for alias in aliases)
    return bool(is_view) or func._overloadpacket in FREE or func.namespace == "prim"


def _bytes_moved(
    func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> int:
    packet, made = func._overloadpacket, sum(map(_size, outputs))
    if packet in READ_IN_PART:
        return 2 * made + sum(_size(tensor) for tensor in inputs[1:])
    read = sum(_size(tensor) for tensor in {id(tensor): tensor for tensor in inputs}.values())
    if not func._schema.is_mutable:
        return read + made
    written = 0
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            written += sum(map(_size, _tensors(given)))
    return read if packet in OVERWRITES else read + written  # of these one input is not read


def _size(tensor: Tensor) -> int:
    """Bytes that are there; what is expanded is there once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = ATTENTION.get(func._overloadpacket)
    if formula is not None:
        return formula(*args)
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


# torch does not count attention on the CPU, nor that of packed segments whose bounds have no
# values. Each of two products is 2 x queries x keys x width; the backward pass computes five.
def _padded(query: Tensor, key: Tensor, *_: Any) -> int:
    batch, heads, queries, width = query.shape
    return 4 * batch * heads * queries * key.shape[2] * width


def _packed(q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, *_: Any) -> int:
    queries, keys = (np.diff(_values(bounds).astype(np.int64)) for bounds in (bounds_q, bounds_k))
    return 4 * int((queries * keys).sum()) * q.shape[1] * q.shape[2]


def _values(tensor: Tensor) -> Any:
    known = getattr(tensor, HOST_VALUES, None)
    return tensor.cpu().numpy() if known is None else known


ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _padded,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, q, k, *rest: _padded(q, k) * 5 // 2
    ),
    varlen._varlen_attn: _packed,
    varlen._varlen_attn_backward: (
        lambda _, q, k, v, out, lse, *bounds: _packed(q, k, v, *bounds) * 5 // 2
    ),
}
