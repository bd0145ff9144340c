"""Sizes of whole steps: one batch of a device, the model that it goes through, and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.models import PROPORTIONS, QWEN2_VL_2B, SMALL
from benchmarks.samples import Mix
from benchmarks.training import Model


@dataclass(frozen=True)
class Size:
    """A batch of one device.

    Attributes:
        query: what has a picture; its target is what the bridge rebuilds.
        positive: texts.
        token_budget: tokens of a chunk of ours.
        keep_gib: of graphs that our gradient cache keeps beyond one chunk's.
    """

    batch: int
    model: Model
    query: Mix
    positive: Mix
    token_budget: int
    keep_gib: float


def pictures(text: int, target: int, side: int) -> Mix:
    """Median tokens beside a picture, whose sides are around `side`, the most after resizing."""
    sides = (round(0.75 * side), side, round(1.4 * side))
    return Mix(text=text, target=target, spread=SPREAD, sides=sides, max_pixels=side**2)


def texts(tokens: int, *, spread: float) -> Mix:
    """Without pictures."""
    return Mix(text=tokens, target=0, spread=spread, sides=(), max_pixels=1)


def tuned(size: Size, tuning: str) -> Size:
    """The same with other weights trained."""
    return replace(size, model=replace(size.model, tuning=tuning))


SPREAD = 0.6
F32, BF16 = torch.float32, torch.bfloat16
NO_TEXTS = texts(0, spread=0)


def tiny(side: int) -> Model:
    return Model(SMALL, F32, "sdpa", side**2, "dora", 0.1, False, False)


def middle(side: int) -> Model:
    return Model(PROPORTIONS, F32, "sdpa", side**2, "dora", 0.1, False, True)


def large(side: int) -> Model:
    return Model(QWEN2_VL_2B, BF16, "auto", side**2, "dora", 0.1, False, False)


# Visual tokens of a picture are (side / 28) ^ 2 at most: 16 to 64 on a CPU, 256 on a GPU.
CONTRAST = {
    "test": Size(5, tiny(84), pictures(5, 0, 84), texts(8, spread=SPREAD), 60, 0.0),
    "cpu": Size(8, middle(168), pictures(16, 0, 168), texts(16, spread=SPREAD), 512, 0.0),
    "cuda": Size(128, large(448), pictures(64, 0, 448), texts(64, spread=SPREAD), 8192, 30.0),
}
# Micro-batches are those of the released scripts.
CAPTIONS = {
    "test": Size(4, tiny(84), pictures(9, 0, 84), NO_TEXTS, 80, 0.0),
    "cpu": Size(16, middle(140), pictures(16, 0, 140), NO_TEXTS, 1024, 0.0),
    "cuda": Size(16, large(448), pictures(64, 0, 448), NO_TEXTS, 8192, 0.0),
}
BRIDGE = {
    "test": Size(4, tiny(84), pictures(5, 8, 84), NO_TEXTS, 80, 0.0),
    "cpu": Size(8, middle(224), pictures(6, 24, 224), NO_TEXTS, 1024, 0.0),
    "cuda": Size(8, large(448), pictures(24, 64, 448), NO_TEXTS, 8192, 0.0),
}
ITEMS = {
    "test": tuned(CAPTIONS["test"], "none"),
    "cpu": replace(tuned(CAPTIONS["cpu"], "none"), query=pictures(24, 0, 140)),
    "cuda": replace(tuned(CAPTIONS["cuda"], "none"), batch=128),
}
# No padding and no adapter: what is left is how the cache is filled.
EVEN = texts(24, spread=0)
EVEN_TEXTS = {
    "test": Size(16, replace(tiny(28), tuning="full"), EVEN, EVEN, 400, 0.0),
    "cpu": Size(16, replace(middle(28), tuning="full"), EVEN, EVEN, 400, 0.0),
    "cuda": Size(256, large(28), texts(128, spread=0), texts(128, spread=0), 16384, 30.0),
}
SKEWED = texts(24, spread=0.8)
SKEWED_TEXTS = {
    "test": replace(ITEMS["test"], batch=24, query=texts(8, spread=0.8), token_budget=200),
    "cpu": replace(ITEMS["cpu"], batch=32, query=SKEWED),
    "cuda": replace(ITEMS["cuda"], batch=1024, query=SKEWED, token_budget=16384),
}
# By hand, not among `all`: the batch of the paper on one device.
WHOLE_BATCH = {
    "test": CONTRAST["test"],
    "cpu": Size(1024, middle(112), pictures(16, 0, 112), texts(16, spread=SPREAD), 512, 0.0),
    "cuda": replace(CONTRAST["cuda"], batch=1024),
}
