"""Rows of a batch in, the chunks of a step out: cut to the token budget and laid out.

    samples -> sorted by cost and cut -> (corrupted) -> laid out

All of it happens on the host, in the data workers, and travels from there to the step (`Step`). The
step moves one chunk at a time to the device, so its memory does not grow with the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from cocoa_pl.attention.plan import on_device
from cocoa_pl.batch import Batch, Rows, cut_by_cost, join
from cocoa_pl.corruption import (
    Corrupted,
    Corruption,
    Noise,
    join_corrupted,
    noise_of,
    untouched,
)
from cocoa_pl.models.layout import Layout, Layouts
from cocoa_pl.stages.bridge import exchange_contexts


@dataclass(frozen=True)
class Chunk:
    """Samples that go through the model together."""

    batch: Batch
    layout: Layout

    def to(self, device: torch.device) -> Chunk:
        return Chunk(self.batch.to(device), self.layout.to(device))

    def pin_memory(self) -> Chunk:
        return Chunk(self.batch.pin_memory(), self.layout.pin_memory())


@dataclass(frozen=True)
class Puzzle:
    """Corrupted samples that go through the model together, and what is asked about them.

    Attributes:
        seen: what is hidden of them, always on the host.
        batch: the same samples where the model is.
        states: (M) int64, the rows of the states that hidden tokens are predicted from.
        targets: (M) int64, the hidden tokens.
        visual_rows: (V) int64, the hidden visual tokens among all tokens.
        visual_places: (V) int64, the same among visual tokens.
        noise: what their patches are replaced by.
    """

    seen: Corrupted
    batch: Batch
    layout: Layout
    states: Tensor
    targets: Tensor
    visual_rows: Tensor
    visual_places: Tensor
    noise: Noise

    def to(self, device: torch.device) -> Puzzle:
        def moved(tensor: Tensor) -> Tensor:
            return on_device(tensor, device)

        noise = self.noise
        return Puzzle(
            self.seen,
            self.batch.to(device),
            self.layout.to(device),
            moved(self.states),
            moved(self.targets),
            moved(self.visual_rows),
            moved(self.visual_places),
            Noise(moved(noise.rows), moved(noise.seeds), moved(noise.places)),
        )

    def pin_memory(self) -> Puzzle:
        batch = self.batch.pin_memory()
        seen = replace(self.seen, batch=batch)
        return replace(self, batch=batch, seen=seen, layout=self.layout.pin_memory())


@dataclass(frozen=True)
class Rebuilt:
    """What a model says about a puzzle.

    Attributes:
        logits: (M, V), of the hidden tokens.
        predicted: (V, merge_size ** 2 * B), pixels of the hidden visual tokens, normalised.
        wanted: the same as they are; both are None without an image decoder.
    """

    logits: Tensor
    predicted: Tensor | None
    wanted: Tensor | None


AnyChunk = TypeVar("AnyChunk", Chunk, Puzzle)


@dataclass(frozen=True)
class Step(Generic[AnyChunk]):
    """What one rank does in one step.

    Attributes:
        chunks: with each sample of the rows once.
        others: the same samples behind other samples' contexts; only where that is measured.
        order: (S) int64, for each sample in the order of the rows its place in that of the chunks.
        keys: (S) int64, of the samples in the order of the rows.
        row_ids: of the rows.
        skipped: why rows are missing, where the config allows it.
    """

    chunks: tuple[AnyChunk, ...]
    others: tuple[AnyChunk, ...]
    order: Tensor
    keys: Tensor
    num_rows: int
    num_tokens: int
    row_ids: tuple[str, ...]
    skipped: tuple[str, ...]

    def pin_memory(self) -> Step[AnyChunk]:
        return replace(
            self,
            chunks=tuple(chunk.pin_memory() for chunk in self.chunks),
            others=tuple(chunk.pin_memory() for chunk in self.others),
        )


class Preparation(ABC, Generic[AnyChunk]):
    """Makes steps of rows; small, and pickled into the workers.

    Args:
        layouts: of the model.
        token_budget: tokens of a chunk.
    """

    def __init__(self, layouts: Layouts, *, token_budget: int) -> None:
        self.layouts = layouts
        self.token_budget = token_budget

    def __call__(self, rows: Rows) -> Step[AnyChunk]:
        batch = rows.batch
        pieces = cut_by_cost(batch.lengths, batch.costs, self.token_budget)
        return Step(
            chunks=self.chunks(batch, pieces),
            others=self.others(batch),
            order=torch.cat(pieces).argsort(),
            keys=batch.keys,
            num_rows=rows.num_rows,
            num_tokens=batch.num_tokens,
            row_ids=batch.row_ids[: rows.num_rows],
            skipped=rows.skipped,
        )

    @abstractmethod
    def chunks(self, batch: Batch, pieces: Sequence[Tensor]) -> tuple[AnyChunk, ...]:
        """A chunk of each piece, which names samples of the batch."""

    def others(self, batch: Batch) -> tuple[AnyChunk, ...]:
        return ()

    @abstractmethod
    def filler(self, batch: Batch) -> AnyChunk:
        """A chunk of fillers, of which nothing is asked."""

    @abstractmethod
    def filled(self, chunk: AnyChunk, filler: Batch) -> AnyChunk:
        """A chunk on the host with fillers behind its samples."""


class ToEmbed(Preparation[Chunk]):
    """Samples as they are."""

    def chunks(self, batch: Batch, pieces: Sequence[Tensor]) -> tuple[Chunk, ...]:
        return tuple(self._chunk(batch.take(piece)) for piece in pieces)

    def filler(self, batch: Batch) -> Chunk:
        return self._chunk(batch)

    def filled(self, chunk: Chunk, filler: Batch) -> Chunk:
        return self._chunk(join([chunk.batch, filler]))

    def _chunk(self, batch: Batch) -> Chunk:
        return Chunk(batch, self.layouts(batch))


class ToRebuild(Preparation[Puzzle]):
    """Samples of which something is hidden.

    Args:
        exchanging: also put them behind other samples' contexts.
    """

    def __init__(self, corruption: Corruption, *, exchanging: bool, **shared: Any) -> None:
        super().__init__(**shared)
        self.corruption = corruption
        self.exchanging = exchanging

    def chunks(self, batch: Batch, pieces: Sequence[Tensor]) -> tuple[Puzzle, ...]:
        return tuple(self._puzzle(self.corruption(batch.take(piece))) for piece in pieces)

    def others(self, batch: Batch) -> tuple[Puzzle, ...]:
        if not self.exchanging or batch.num_samples == 1:  # a sample alone has no other
            return ()
        exchanged = exchange_contexts(self.corruption(batch))
        lengths, costs = exchanged.batch.lengths, exchanged.batch.costs
        pieces = cut_by_cost(lengths, costs, self.token_budget)
        return tuple(self._puzzle(exchanged.take(piece)) for piece in pieces)

    def filler(self, batch: Batch) -> Puzzle:
        return self._puzzle(untouched(batch))

    def filled(self, chunk: Puzzle, filler: Batch) -> Puzzle:
        return self._puzzle(join_corrupted([chunk.seen, untouched(filler)]))

    def _puzzle(self, seen: Corrupted) -> Puzzle:
        batch = seen.batch
        hidden = seen.token_mask.nonzero()[:, 0]
        return Puzzle(
            seen=seen,
            batch=batch,
            layout=self.layouts(batch),
            states=hidden - 1,
            targets=seen.labels[hidden],
            visual_rows=seen.patch_mask.nonzero()[:, 0],
            visual_places=seen.patch_mask[batch.image_mask].nonzero()[:, 0],
            noise=noise_of(batch, seen.patch_mask, merge_size=self.corruption.merge_size),
        )
