"""Image grids in, the index arithmetic that a vision tower asks of them out.

The stock towers work these out themselves when they are not given them, and wait for the device on
the way. Here the same stock functions run on the host, once for each size of image.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from cocoa_pl.attention import Plan, self_plan

MAX_KNOWN_GRIDS = 1024  # images of a batch share few sizes


@dataclass(frozen=True)
class WindowPlans:
    """Who attends to whom in a tower whose blocks are of two kinds."""

    images: Plan  # every image by itself
    windows: Plan  # every window of every image by itself

    def to(self, device: torch.device | str) -> "WindowPlans":
        """The same plans for another device."""
        return WindowPlans(self.images.to(device), self.windows.to(device))

    def prepared(self, kernel: str) -> "WindowPlans":
        return WindowPlans(self.images.prepared(kernel), self.windows.prepared(kernel))

    def pin_memory(self) -> "WindowPlans":
        return WindowPlans(self.images.pin_memory(), self.windows.pin_memory())


@dataclass(frozen=True)
class Windows:
    """Visual tokens in the order of their windows, which lie end to end.

    `index[i]` is the visual token (in reading order) at place i; `lengths` counts patches.
    """

    index: Tensor  # (V) int64
    lengths: Tensor  # (W) int64


def positions(grids: Tensor, *, merge_size: int) -> Tensor:
    """Row and column of every patch, in the order of the patches: (I, 3) -> (P, 2) int64, CPU."""
    return torch.cat([_positions(*grid, merge_size) for grid in _sizes(grids)])


def windows(grids: Tensor, *, merge_size: int, window_size: int, patch_size: int) -> Windows:
    """Cut images into windows of `window_size` pixels a side (Qwen2.5-VL, arXiv 2502.13923).

    Windows at the right and lower edges are smaller; no window holds parts of two images.
    """
    pieces = [_windows(*grid, merge_size, window_size, patch_size) for grid in _sizes(grids)]
    tokens = torch.tensor([len(piece.index) for piece in pieces])
    first = torch.repeat_interleave(tokens.cumsum(0) - tokens, tokens)
    return Windows(
        torch.cat([piece.index for piece in pieces]) + first,
        torch.cat([piece.lengths for piece in pieces]),
    )


def interpolation(grids: Tensor, *, merge_size: int, side: int) -> tuple[Tensor, Tensor]:
    """Where each patch reads a `side` x `side` table of learnt position embeddings.

    Returns:
        (P, 4) int64 rows of the table and (P, 4) float32 weights, bilinear with aligned corners.
    """
    pieces = [_interpolation(*grid, merge_size, side) for grid in _sizes(grids)]
    return torch.cat([index for index, _ in pieces]), torch.cat([w for _, w in pieces])


def whole_images(grids: Tensor, *, merge_size: int) -> dict[str, Any]:
    """Keywords of a stock tower whose blocks see whole images: (I, 3), at least one image."""
    patches = grids.prod(1)  # of each image
    return {
        "position_ids": positions(grids, merge_size=merge_size),
        "cu_seqlens": _bounds(patches),
        "max_seqlen": int(patches.max()),
        "plan": self_plan(patches),
    }


def windowed_images(
    grids: Tensor, *, merge_size: int, window_size: int, patch_size: int
) -> dict[str, Any]:
    """Keywords of a tower some of whose blocks see windows; both its plans speak of patches in the
    order of windows, in which an image's patches stay together.
    """
    found = windows(grids, merge_size=merge_size, window_size=window_size, patch_size=patch_size)
    whole = whole_images(grids, merge_size=merge_size)
    return whole | {
        "plan": WindowPlans(whole["plan"], self_plan(found.lengths)),
        "window_index": found.index,
        "cu_window_seqlens": _bounds(found.lengths),
        "max_window_seqlen": int(found.lengths.max()),
    }


def interpolated_images(grids: Tensor, *, merge_size: int, side: int) -> dict[str, Any]:
    """Keywords of a tower with a `side` x `side` table of position embeddings."""
    index, weights = interpolation(grids, merge_size=merge_size, side=side)
    whole = whole_images(grids, merge_size=merge_size)
    return whole | {"interp_indices": index, "interp_weights": weights}


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _sizes(grids: Tensor) -> list[tuple[int, int, int]]:
    return [(frames, height, width) for frames, height, width in grids.tolist()]


@lru_cache(MAX_KNOWN_GRIDS)
def _positions(frames: int, height: int, width: int, merge_size: int) -> Tensor:
    grid = torch.tensor([[frames, height, width]])
    found: Tensor = get_vision_position_ids(grid, merge_size)
    return found


@lru_cache(MAX_KNOWN_GRIDS)
def _windows(
    frames: int, height: int, width: int, merge_size: int, window_size: int, patch_size: int
) -> Windows:
    grid = torch.tensor([[frames, height, width]])
    index, cumulative = get_vision_window_index(grid, merge_size, window_size, patch_size)
    return Windows(index, cumulative.diff().long())


@lru_cache(MAX_KNOWN_GRIDS)
def _interpolation(
    frames: int, height: int, width: int, merge_size: int, side: int
) -> tuple[Tensor, Tensor]:
    grid = torch.tensor([[frames, height, width]])
    found: tuple[Tensor, Tensor] = get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=merge_size
    )
    return found
