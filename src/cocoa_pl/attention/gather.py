"""Packed rows in, the rows that a kernel reads out, one after the other; and back.

A token may be read by several segments (EOS under `eos_bridge` by three), and rectangles have
places that no token fills. Copying is exact. The backward pass is a gather too: it adds a token's
copies in one fixed order, in float32 (in float64 for float64), and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """Which of T tokens lies at each of K places, and where the copies of each token are.

    Copies are listed by rank, so that no list names a token twice. Places that no list names are
    padding: they repeat some token, and their gradients are zero.
    """

    index: Tensor  # (K) int64, the token at each place
    first: Tensor  # (T) int64, the place of each token's first copy
    more: tuple[tuple[Tensor, Tensor], ...]  # tokens that have a next copy, and its places
    in_place: bool  # places are the tokens as they lie: nothing is copied, and the lists not read

    def to(self, device: torch.device) -> Gather:
        return self if self.in_place else self._each(lambda part: on_device(part, device))

    def pin_memory(self) -> Gather:
        return self if self.in_place else self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Gather:
        more = tuple((change(tokens), change(places)) for tokens, places in self.more)
        return Gather(change(self.index), change(self.first), more, self.in_place)


def make_gather(index: Tensor, real: Tensor) -> Gather:
    """List the copies of every token.

    Args:
        index: (K) int64 on the CPU; every token stands at a real place at least once.
        real: (K) bool, False for padding.
    """
    places = real.numpy().nonzero()[0]
    tokens = index.numpy()[places]
    num_tokens = int(tokens.max()) + 1
    ranks: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    while len(tokens):
        place = np.empty(num_tokens, dtype=np.int64)
        place[tokens[::-1]] = places[::-1]  # numpy keeps what is written last: the first copy
        now = place[tokens] == places
        ranks.append((tokens[now], places[now]) if ranks else (np.arange(num_tokens), place))
        tokens, places = tokens[~now], places[~now]
    (_, first), *more = [(torch.from_numpy(t), torch.from_numpy(p)) for t, p in ranks]
    in_place = len(index) == num_tokens and torch.equal(index, torch.arange(num_tokens))
    return Gather(index, first, tuple(more), in_place)


def gather(rows: Tensor, wanted: Gather) -> Tensor:
    """(T, ...) -> (K, ...), differentiable and deterministic."""
    if wanted.in_place:
        return rows
    copies: Tensor = _Gather.apply(rows, wanted)
    return copies


def ungather(rows: Tensor, wanted: Gather) -> Tensor:
    """(K, ...) -> (T, ...), what lies at the first place of every token."""
    if wanted.in_place:
        return rows
    tokens: Tensor = _Ungather.apply(rows, wanted)
    return tokens


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on another device, without waiting for it: from pinned memory, the copy takes
    its turn behind the work that is queued there.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Gather) -> Tensor:
        ctx.wanted = wanted
        return rows.index_select(0, wanted.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wanted: Gather = ctx.wanted
        total = gradient.index_select(0, wanted.first)
        if wanted.more:
            total = total.to(torch.promote_types(gradient.dtype, torch.float32))
        for tokens, places in wanted.more:
            total.index_add_(0, tokens, gradient.index_select(0, places).to(total.dtype))
        return total.to(gradient.dtype), None


class _Ungather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Gather) -> Tensor:
        ctx.wanted = wanted
        return rows.index_select(0, wanted.first)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wanted: Gather = ctx.wanted
        padded = gradient.new_zeros(len(wanted.index), *gradient.shape[1:])
        return padded.index_copy_(0, wanted.first, gradient), None
