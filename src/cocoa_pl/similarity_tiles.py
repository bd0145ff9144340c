"""Queries and candidates in, losses and hits of InfoNCE out, one tile of their similarities at a
time.

What stays from the forward pass is one number a query, the log-sum-exp of its row; tiles are
computed again in the backward pass, as in flash attention (arXiv 2205.14135). Cheng et al. 2024
(Inf-CL, arXiv 2410.17243) do this for a contrastive loss. Shape legend: N queries, M candidates,
D dimensions, R x C a tile of at most block x block.
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

    def seen(self, rows: slice, columns: slice) -> Tensor:
        """(R, C) similarities."""
        return similarities(self.queries[rows], self.candidates[columns])

    def place(self, rows: slice, columns: slice) -> Tensor:
        """(R, 1) where each query's positive lies in this tile; outside 0..C where it does not."""
        return self.positive_index[rows, None] - columns.start

    def hidden(self, rows: slice, columns: slice) -> Tensor | None:
        """(R, C) bool, True for what is neither positive nor negative: `same_content` of a tile."""
        if self.keys is None:
            return None
        same = self.keys.targets[rows, None] == self.keys.candidates[columns]
        same |= self.keys.queries[rows, None] == self.keys.partners[columns]
        return same & (self.place(rows, columns) != _numbers(same))


class TiledInfoNCE(torch.autograd.Function):
    """`losses, hits = TiledInfoNCE.apply(queries, candidates, scale, tiles)`; the first two are
    those of `tiles`, named again because autograd looks at arguments only.

    Gradients are exact, also that of the inverse temperature. A second derivative is refused.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, scale: Tensor, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        found = [_scan(tiles, rows, scale) for rows in tiles.rows]
        normalizers, scores, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
        keys = () if tiles.keys is None else tiles.keys
        ctx.save_for_backward(queries, candidates, scale, tiles.positive_index, normalizers, *keys)
        ctx.block = tiles.block
        hits = nearest == tiles.positive_index
        ctx.mark_non_differentiable(hits)
        return normalizers - scores * scale, hits

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # `once_differentiable` lets constants pass for gradients here
            raise RuntimeError("InfoNCE by tiles has no second derivative: do not create a graph")
        queries, candidates, scale, positive_index, normalizers, *keys = ctx.saved_tensors
        tiles = Tiles(
            queries, candidates, positive_index, TileKeys(*keys) if keys else None, ctx.block
        )
        of_queries, of_candidates = torch.empty_like(queries), torch.zeros_like(wide(candidates))
        of_scale = normalizers.new_zeros(())
        for rows in tiles.rows:
            own = wide(queries[rows])
            total = torch.zeros_like(own)  # by the queries times the inverse temperature
            for columns in tiles.columns:
                errors = _errors(tiles, rows, columns, scale, normalizers)
                errors.mul_(of_losses[rows, None])
                with torch.autocast(queries.device.type, enabled=False):
                    total.addmm_(errors, wide(candidates[columns]))
                    of_candidates[columns].addmm_(errors.T, own)
            of_scale += (total * own).sum()
            of_queries[rows] = total.mul_(scale)
        of_candidates = of_candidates.mul_(scale).to(candidates.dtype)
        return of_queries, of_candidates, of_scale.to(scale.dtype), None


def _scan(tiles: Tiles, rows: slice, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is known of a row when all of its tiles have been seen.

    Returns:
        (R) the log-sum-exp of its logits, (R) its positive's similarity, (R) int64 the candidate
        that is nearest: the first of equals, and a NaN before all others, as argmax has it.
    """
    scores = wide(tiles.queries.new_zeros(rows.stop - rows.start))
    normalizers = best = torch.full_like(scores, -torch.inf)
    nearest = torch.zeros_like(scores, dtype=torch.int64)
    for columns in tiles.columns:
        seen = tiles.seen(rows, columns)
        hidden, place = tiles.hidden(rows, columns), tiles.place(rows, columns)
        # Every row reads somewhere: asking which positives lie here would wait for the device.
        read = seen.gather(1, place.clamp(0, seen.shape[1] - 1))
        scores = torch.where((place >= 0) & (place < seen.shape[1]), read, scores[:, None])[:, 0]
        logits = seen * scale
        if hidden is not None:
            logits.masked_fill_(hidden, -torch.inf)
            seen.masked_fill_(hidden, -torch.inf)
        normalizers = normalizers.logaddexp(logits.logsumexp(1))
        highest, index = seen.max(1)
        better = (highest > best) | (highest.isnan() & ~best.isnan())
        best = torch.where(better, highest, best)
        nearest = torch.where(better, index + columns.start, nearest)
    return normalizers, scores, nearest


def _errors(
    tiles: Tiles, rows: slice, columns: slice, scale: Tensor, normalizers: Tensor
) -> Tensor:
    """(R, C) softmax less one at the positive: the gradient of the losses by the logits."""
    share = (tiles.seen(rows, columns) * scale).sub_(normalizers[rows, None]).exp_()
    hidden = tiles.hidden(rows, columns)
    if hidden is not None:
        share.masked_fill_(hidden, 0)
    return share.sub_((tiles.place(rows, columns) == _numbers(share)).to(share.dtype))


def _numbers(tile: Tensor) -> Tensor:
    """(C) 0, 1, 2, ... of its columns."""
    return torch.arange(tile.shape[1], device=tile.device)


def _pieces(length: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, length)) for start in range(0, max(length, 1), block))
