"""Queries and candidates in, losses and hits of InfoNCE out, one tile of their similarities at a
time.

What stays from the forward pass is two numbers a query, its positive's similarity and its loss;
tiles are computed again in the backward pass, as in flash attention (arXiv 2205.14135). Cheng et
al. 2024 (Inf-CL, arXiv 2410.17243) do this for a contrastive loss. Shape legend: N queries, M
candidates, D dimensions, R x C a tile of at most block x block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) in float32 (float64 for float64), under autocast too."""
    with torch.autocast(queries.device.type, enabled=False):
        return wide(queries) @ wide(candidates).T


def wide(states: Tensor) -> Tensor:
    """In the type that losses are computed in."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


class TileKeys(NamedTuple):
    """Contents by which false negatives are told; equal keys are equal contents."""

    queries: Tensor  # (N) int64
    targets: Tensor  # (N) int64, of each query's positive
    partners: Tensor  # (M) int64, of the query that a candidate belongs to; -1 for none
    candidates: Tensor  # (M) int64


@dataclass(frozen=True)
class Tiles:
    """The table of similarities, which is never in memory as a whole.

    Attributes:
        queries, candidates: (N, D), (M, D).
        positive_index: (N) int64, each query's positive among the candidates.
        keys: None where nothing is a false negative.
        block: the side of a tile.
    """

    queries: Tensor
    candidates: Tensor
    positive_index: Tensor
    keys: TileKeys | None
    block: int

    @property
    def rows(self) -> Iterator[slice]:
        return _pieces(len(self.queries), self.block)

    @property
    def columns(self) -> Iterator[slice]:
        return _pieces(len(self.candidates), self.block)

    def positive(self, rows: slice) -> Tensor:
        """(R) the similarity of each query and its positive."""
        chosen = self.candidates.index_select(0, self.positive_index[rows])
        return (wide(self.queries[rows]) * wide(chosen)).sum(1)

    def is_positive(self, rows: slice, columns: slice) -> Tensor:
        """(R, C) bool."""
        numbers = torch.arange(columns.start, columns.stop, device=self.queries.device)
        return self.positive_index[rows, None] == numbers

    def hidden(self, rows: slice, columns: slice) -> Tensor | None:
        """(R, C) bool, True for what is neither positive nor negative: `same_content` of a tile."""
        if self.keys is None:
            return None
        same = self.keys.targets[rows, None] == self.keys.candidates[columns]
        same |= self.keys.queries[rows, None] == self.keys.partners[columns]
        return same & ~self.is_positive(rows, columns)

    def seen(self, rows: slice, columns: slice) -> Tensor:
        """(R, C) similarities; -inf where a false negative is hidden."""
        seen = similarities(self.queries[rows], self.candidates[columns])
        hidden = self.hidden(rows, columns)
        return seen if hidden is None else seen.masked_fill_(hidden, -torch.inf)

    def margins(self, seen: Tensor, rows: slice, columns: slice, positive: Tensor) -> Tensor:
        """(R, C) similarities less the positive's, which is exactly 0: so a small loss is not what
        is left of two large numbers.
        """
        margins = seen - positive[:, None]
        return margins.masked_fill_(self.is_positive(rows, columns), 0)


class TiledInfoNCE(torch.autograd.Function):
    """`losses, hits, compared = TiledInfoNCE.apply(queries, candidates, scale, tiles)`; the first
    two are those of `tiles`, named again because autograd looks at arguments only.

    Gradients are exact, also that of the inverse temperature. A second derivative is refused.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, scale: Tensor, tiles: Tiles
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = [_scan(tiles, rows, scale) for rows in tiles.rows]
        losses, positive, nearest, seen = (torch.cat(parts) for parts in zip(*found, strict=True))
        keys = () if tiles.keys is None else tiles.keys
        numbers = (tiles.positive_index, positive, losses)
        ctx.save_for_backward(queries, candidates, scale, *numbers, *keys)
        ctx.block = tiles.block
        compared = seen > 1
        hits = (nearest == tiles.positive_index) & compared
        ctx.mark_non_differentiable(hits, compared)
        return losses, hits, compared

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # `once_differentiable` lets constants pass for gradients here
            raise RuntimeError("InfoNCE by tiles has no second derivative: do not create a graph")
        queries, candidates, scale, positive_index, positive, losses, *keys = ctx.saved_tensors
        tiles = Tiles(
            queries, candidates, positive_index, TileKeys(*keys) if keys else None, ctx.block
        )
        of_queries, of_candidates = torch.empty_like(queries), torch.zeros_like(wide(candidates))
        of_scale = losses.new_zeros(())
        for rows in tiles.rows:
            own = wide(queries[rows])
            total = torch.zeros_like(own)  # by the queries times the inverse temperature
            for columns in tiles.columns:
                # Softmax less one at the positive: the gradient of the losses by the logits.
                seen = tiles.seen(rows, columns)
                errors = tiles.margins(seen, rows, columns, positive[rows]).mul_(scale)
                errors.sub_(losses[rows, None]).exp_()
                errors.masked_fill_(seen.isneginf(), 0)  # hidden, even beside a NaN
                errors.sub_(tiles.is_positive(rows, columns).to(errors.dtype))
                errors.mul_(of_losses[rows, None])
                with torch.autocast(queries.device.type, enabled=False):
                    total.addmm_(errors, wide(candidates[columns]))
                    of_candidates[columns].addmm_(errors.T, own)
            of_scale += (total * own).sum()
            of_queries[rows] = total.mul_(scale)
        of_candidates = of_candidates.mul_(scale).to(candidates.dtype)
        return of_queries, of_candidates, of_scale.to(scale.dtype), None


def _scan(tiles: Tiles, rows: slice, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known of a row when all of its tiles have been seen.

    Returns:
        (R) its loss, (R) its positive's similarity, (R) int64 the candidate that is nearest: the
        first of equals, and a NaN before all others, as argmax has it; (R) int64 how many it was
        compared with, itself included.
    """
    positive = tiles.positive(rows)
    losses = best = torch.full_like(positive, -torch.inf)
    nearest, count = torch.zeros((2, len(positive)), dtype=torch.int64, device=positive.device)
    for columns in tiles.columns:
        seen = tiles.seen(rows, columns)
        margins = tiles.margins(seen, rows, columns, positive).mul_(scale)
        losses = losses.logaddexp(margins.logsumexp(1))
        count = count + (~seen.isneginf()).sum(1)
        highest, index = seen.max(1)
        better = (highest > best) | (highest.isnan() & ~best.isnan())
        best = torch.where(better, highest, best)
        nearest = torch.where(better, index + columns.start, nearest)
    return losses, positive, nearest, count


def _pieces(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, max(length, 1), block))
