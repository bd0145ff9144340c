"""Exact counts of what a function computes and how much memory it takes: the same on any machine of
a kind, so that tests can hold them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

Run = Callable[[], object]


def count(run: Run, *, device: torch.device, model: nn.Module | None = None) -> dict[str, float]:
    """Counts of one call.

    Args:
        model: whose passes are counted; it takes `inputs_embeds`, (B, N, D).

    Returns:
        `flops` of matrix products and attention, forward and backward; `kernels`, operators that
        torch runs; `peak_bytes`, the most memory that tensors made in the call take at any time;
        and of a model `passes` and `token_slots`, tokens that go through it with their padding.
    """
    slots: list[int] = []

    def watch(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        slots.append(inputs["inputs_embeds"].shape[:2].numel())

    hook = model.register_forward_pre_hook(watch, with_kwargs=True) if model else nullcontext()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with hook, nullcontext() if cuda else LiveBytes() as live, Operators() as operators:
        run()
    found: dict[str, float] = {
        "flops": operators.flops,
        "kernels": operators.count,
        "peak_bytes": live.peak if live else torch.cuda.max_memory_allocated(device) - before,
    }
    return found | ({"passes": len(slots), "token_slots": sum(slots)} if model else {})


class Operators(TorchDispatchMode):
    """Counts torch's operators and their operations, by the formulas of torch's `FlopCounterMode`.

    That one follows modules by hooks, which keep recomputed graphs until it ends: on a GPU a
    contrastive step of 11 GiB took all 139 while it was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        formula = ATTENTION.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:  # without gradients a layer's operator comes whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.count += 1
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


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


# torch has no formula for attention on the CPU, nor before 2.13 for packed segments. Each of two
# products is 2 x queries x keys x width; backward there are five: scores again, and gradients of
# values, scores, queries and keys.
def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query.shape
    return 4 * batch * heads * queries * key.shape[2] * width


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, *__: Any, **___: Any) -> int:
    return _attention(query, key) * 5 // 2


def _packed(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, *_: Any, **__: Any
) -> int:
    scores = (bounds_q.diff().long() * bounds_k.diff()).sum()
    return 4 * int(scores) * q.shape[1] * q.shape[2]


def _packed_backward(
    _: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *bounds: Any, **__: Any
) -> int:
    return _packed(q, k, v, *bounds) * 5 // 2


ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.torch_attn._varlen_attn: _packed,
    torch.ops.torch_attn._varlen_attn_backward: _packed_backward,
}
