"""Padded inputs of a stock Qwen2-VL, as peers' collators make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

IGNORED = -100  # cross_entropy's own mark


@dataclass(frozen=True)
class Row:
    """One sample: tokens as the model sees them, and what it must say.

    Attributes:
        input_ids: (t) int64, a picture's tokens already repeated.
        image_mask: (t) bool.
        labels: (t) int64, `IGNORED` where nothing is hidden.
        segment_lengths: (3) int64, CONTEXT, BOTTLENECK, TARGET.
        picture: at most one.
        hidden_patches: (p) bool; None without a picture.
        noise: (h, B) float, one frame of each hidden patch; None where nothing is hidden.
    """

    input_ids: Tensor
    image_mask: Tensor
    labels: Tensor
    segment_lengths: Tensor
    picture: Image | None
    hidden_patches: Tensor | None
    noise: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """A padded batch; pictures stay apart by row until a forward pass wants them together."""

    input_ids: Tensor  # (B, N) int64
    attention_mask: Tensor  # (B, N) int64
    token_types: Tensor  # (B, N) int64, 1 for visual tokens
    labels: Tensor  # (B, N) int64
    segment_lengths: Tensor  # (B, 3) int64, CPU
    pixel_values: tuple[Tensor | None, ...]  # of each row (p, channels x frames x B)
    grids: tuple[Tensor | None, ...]  # of each row (1, 3)

    @property
    def slots(self) -> int:
        """Tokens, padding included."""
        return self.input_ids.numel()

    def split(self, size: int) -> list[Inputs]:
        """Chunks of `size` rows, still padded to the longest of the whole: as VLM2Vec-V2 cuts a
        device's batch that its collator has padded before.
        """
        return [self._cut(slice(start, start + size)) for start in range(0, len(self.grids), size)]

    def _cut(self, rows: slice) -> Inputs:
        return Inputs(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.token_types[rows],
            self.labels[rows],
            self.segment_lengths[rows],
            self.pixel_values[rows],
            self.grids[rows],
        )


def padded(
    rows: Sequence[Row], *, image_processor: Any, pad_id: int, device: torch.device
) -> Inputs:
    """The stock image processor once for every sample, then padding on the right to the longest of
    these rows: the collators of CoCoA and VLM2Vec.

    CoCoA calls this for each chunk of 8, inside of the training step.
    """
    longest = max(len(row.input_ids) for row in rows)

    def pad(values: Sequence[Tensor], fill: int) -> Tensor:
        whole = torch.full((len(values), longest), fill, dtype=torch.int64)
        for place, value in zip(whole, values, strict=True):
            place[: len(value)] = value
        return whole.to(device)

    pictures = [_processed(row, image_processor) for row in rows]
    return Inputs(
        input_ids=pad([row.input_ids for row in rows], pad_id),
        attention_mask=pad([torch.ones_like(row.input_ids) for row in rows], 0),
        token_types=pad([row.image_mask.long() for row in rows], 0),
        labels=pad([row.labels for row in rows], IGNORED),
        segment_lengths=torch.stack([row.segment_lengths for row in rows]),
        pixel_values=tuple(None if p is None else p[0].to(device) for p in pictures),
        grids=tuple(None if p is None else p[1].to(device) for p in pictures),
    )


def _processed(row: Row, image_processor: Any) -> tuple[Tensor, Tensor] | None:
    if row.picture is None:
        return None
    found = image_processor([np.asarray(row.picture)], return_tensors="pt")
    pixels = found["pixel_values"]
    if row.noise is not None:
        frames = pixels.view(len(pixels), 3, 2, -1).clone()
        frames[row.hidden_patches] = row.noise.unflatten(1, (3, 1, -1))
        pixels = frames.flatten(1)
    return pixels, found["image_grid_thw"]
