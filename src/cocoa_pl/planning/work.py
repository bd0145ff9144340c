"""Tokens, patches and attention scores that a model computes for a packed batch.

The counts come from the code that trains: plans and their padding, masking, and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cocoa_pl.attention import Plan, self_plan
from cocoa_pl.data.batch import Batch
from cocoa_pl.planning.shapes import VisionShape

PADDING_KERNELS = ("sdpa",)  # the others compute what a plan asks for and no more


@dataclass(frozen=True)
class Attention:
    """What one attention call computes, for each head."""

    scores: int  # pairs of a query and a key, padding included
    queries: int  # slots, padding included
    keys: int


@dataclass(frozen=True)
class Work:
    """What a forward pass over one chunk has to do."""

    tokens: int
    samples: int
    patches: int
    visual_tokens: int
    text: Attention
    images: Attention  # vision blocks that see whole images
    windows: Attention  # vision blocks that see windows; zeros where there are none
    predicted: int  # positions for which the vocabulary head runs
    rebuilt: int  # visual tokens whose pixels the image decoder predicts


NOTHING = Attention(0, 0, 0)


def work_of(batch: Batch, *, vision: VisionShape, kernel: str) -> Work:
    """Count the work of one chunk.

    Args:
        kernel: a name in `attention.kernels.KERNELS`; `auto` has come to one.
    """
    patches = int(batch.grids.prod(1).sum())
    has_images, has_windows = len(batch.grids) > 0, vision.window > 0
    windows = window_lengths(batch.grids, side=vision.window) if has_windows else torch.empty(0)

    return Work(
        tokens=batch.num_tokens,
        samples=batch.num_samples,
        patches=patches,
        visual_tokens=patches // vision.merge_size**2,
        text=attention_work(batch.plan, kernel),
        images=attention_work(self_plan(batch.grids.prod(1)), kernel) if has_images else NOTHING,
        windows=attention_work(self_plan(windows), kernel) if len(windows) else NOTHING,
        predicted=len(batch.targets),
        rebuilt=len(batch.patch_rows),
    )


def attention_work(plan: Plan, kernel: str) -> Attention:
    """What a kernel computes for a plan."""
    if kernel not in PADDING_KERNELS:
        return Attention(plan.num_scores, int(plan.cu_seqlens_q[-1]), int(plan.cu_seqlens_k[-1]))
    padded = plan.prepared(kernel).padded
    assert padded is not None
    return Attention(
        scores=sum(r.scores for r in padded.rectangles),
        queries=sum(r.segments * r.queries for r in padded.rectangles),
        keys=sum(r.segments * r.keys for r in padded.rectangles),
    )


def window_lengths(grids: Tensor, *, side: int) -> Tensor:
    """Patches in each attention window of Qwen2.5-VL's vision tower: (I, 3) -> (W) int64.

    Windows tile an image from the top left; those at the right and bottom edge may be smaller.
    """
    lengths = [
        height * width
        for frames, *size in grids.tolist()
        for _ in range(frames)
        for height, width in product(*(_tiles(length, side) for length in size))
    ]
    return torch.tensor(lengths, dtype=torch.int64)


def _tiles(length: int, side: int) -> Sequence[int]:
    whole, rest = divmod(length, side)
    return [side] * whole + [rest] * (rest > 0)
