"""Blocks of a backbone are alike, and so are most batches: on tensors without values each kind of
call is run once, and counted as often as it is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from cocoa_pl.models.backbone import Backbone
from cocoa_pl.planning.counting import HOST_VALUES, Call, Counting


class FakeCounting(Counting):
    """Counts what tensors without values do; what has values lies on the host, and is computed."""

    pauses = False  # for what is counted apart

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.prim.device.default:  # most calls of all
            return args[0].fake_device
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        if self.pauses:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def repeated(backbone: Backbone, counting: FakeCounting) -> Iterator[None]:
    """Within this, calls of the backbone's blocks count what the first of their kind costs, and
    return tensors of the right shape.

    Operations, bytes and kernels are those of running every call. Peaks are known to two per cent:
    a block's gradients are held until its backward pass ends.
    """
    blocks = {id(block) for block in backbone.blocks}
    kinds: dict[Any, _Kind] = {}
    places = [
        (parent, name, child)
        for parent in list(backbone.modules())
        for name, child in parent._modules.items()
        if child is not None and id(child) in blocks
    ]
    for parent, name, block in places:
        parent._modules[name] = _Repeated(block, counting, kinds)
    try:
        yield
    finally:
        for parent, name, block in places:
            parent._modules[name] = block


@dataclass
class _Kind:
    """What one kind of call of a block costs.

    Attributes:
        passes: operations of the forward and of the backward pass, and by how many bytes each
            raises at its fullest moment what was alive at its start.
        outputs, spec: what it returns, without values.
        kept: bytes between its passes, beside its inputs and outputs.
        used: which of its inputs and parameters get a gradient.
    """

    passes: list[tuple[Mapping[Call, int], int]]
    outputs: list[Tensor]
    spec: Any
    kept: int
    used: Sequence[bool] = ()


class _Repeated(nn.Module):
    """In the place of a block: its calls only count what a call of that kind costs, which a trial
    with one block of that kind tells.
    """

    def __init__(self, block: nn.Module, counting: FakeCounting, kinds: dict[Any, _Kind]) -> None:
        super().__init__()
        self.block, self.counting, self.kinds = block, counting, kinds
        self.trained = [p for p in block.parameters() if p.requires_grad]
        self.was_called = self.was_tried = False
        plain = (str, bool)  # such as an attention type; numbers tell blocks of a kind apart
        self.make = (
            *(
                (type(part), *(value for value in vars(part).values() if isinstance(value, plain)))
                for part in block.modules()
            ),
            *((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters()),
            *block._forward_pre_hooks.values(),
            *block._forward_hooks.values(),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        inputs = [n for n, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        has_graph = torch.is_grad_enabled() and bool(inputs or self.trained)
        # A block's first call may leave something behind for later ones.
        key = (self.make, has_graph, self.was_called, str(spec))
        key += tuple(_described(leaf, has_graph) for leaf in leaves)
        if (kind := self.kinds.get(key)) is None:
            kind = self.kinds[key] = self._try(leaves, spec, inputs, has_graph)
        self.was_called = True
        if has_graph:
            wanted = [*(leaves[n] for n in inputs), *self.trained]
            outputs = _Replay.apply(self.counting, kind, *wanted)
        else:
            outputs = _replay(self.counting, kind)
        return tree_unflatten(list(outputs), kind.spec)

    def _try(self, leaves: list[Any], spec: Any, inputs: Sequence[int], has_graph: bool) -> _Kind:
        """Run a call on its own, and count it apart."""
        fresh = [x.detach().requires_grad_() if n in inputs else x for n, x in enumerate(leaves)]
        args, kwargs = tree_unflatten(fresh, spec)
        self.counting.pauses = True
        if self.was_called and not self.was_tried:  # what its first call would have left behind
            with torch.no_grad():
                self.block(*args, **kwargs)
        self.was_tried = True
        with FakeCounting() as trial:
            made, out = tree_flatten(self.block(*args, **kwargs))
            kind = _Kind([(trial.calls, trial.peak)], [x.detach() for x in made], out, 0)
            if has_graph:
                kind.kept = max(0, trial.now - sum(x.nbytes for x in made))
                gradients = [torch.empty_like(x) for x in made]
                trial.calls, trial.peak, start = Counter(), trial.now, trial.now
                wanted = [*(fresh[n] for n in inputs), *self.trained]
                found = torch.autograd.grad(made, wanted, gradients, allow_unused=True)
                kind.used = [x is not None for x in found]
                kind.passes.append((trial.calls, trial.peak - start))
        self.counting.pauses = False
        return kind


def _described(leaf: Any, has_graph: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, int | float | str | None) else type(leaf)
    values = getattr(leaf, HOST_VALUES, None)
    held = None if values is None else values.tobytes()
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, has_graph and leaf.requires_grad, held


def _replay(counting: Counting, kind: _Kind) -> tuple[Tensor, ...]:
    counting.repeat(*kind.passes[0])
    return tuple(torch.empty_like(x) for x in kind.outputs)


class _Replay(torch.autograd.Function):
    """A call in the graph, with as many bytes as it would keep there."""

    @staticmethod
    def forward(ctx: Any, counting: Counting, kind: _Kind, *wanted: Tensor) -> tuple[Tensor, ...]:
        outputs = _replay(counting, kind)
        ctx.counting, ctx.kind = counting, kind
        ctx.kept = torch.empty(kind.kept, dtype=torch.uint8)
        ctx.save_for_backward(*wanted)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.counting.repeat(*ctx.kind.passes[1])
        ctx.kept = None
        wanted = zip(ctx.saved_tensors, ctx.kind.used, strict=True)
        return None, None, *(torch.empty_like(x) if used else None for x, used in wanted)
