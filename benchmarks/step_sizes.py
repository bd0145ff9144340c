"""Sizes of whole steps: one batch of a device, the model that it goes through, and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.benchmark import CUDA_IN_FLOAT32
from benchmarks.models import PROPORTIONS, QWEN2_VL_2B, SMALL, with_depth
from benchmarks.peers.model import DENSE_VISION as DENSE
from benchmarks.peers.model import VISION_BY_IMAGE as BY_IMAGE
from benchmarks.samples import Mix
from benchmarks.training import Model


@dataclass(frozen=True)
class Size:
    """A batch of one device.

    Attributes:
        query: what has a picture; its target is what the bridge rebuilds.
        positive: texts.
        token_budget: tokens of a batch of ours.
        peer_vision: how the peer's vision tower attends.
    """

    batch: int
    model: Model
    query: Mix
    positive: Mix
    token_budget: int
    peer_vision: str


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
    return Model(SMALL, F32, "sdpa", side**2, "dora", 0.1, False)


def middle(side: int) -> Model:
    return Model(PROPORTIONS, F32, "sdpa", side**2, "dora", 0.1, False)


def large(side: int) -> Model:
    return Model(QWEN2_VL_2B, BF16, "auto", side**2, "dora", 0.1, False)


def in_float32(size: Size, batch: int, token_budget: int) -> Size:
    """A few samples of it, in float32 through two layers of each tower in their true widths."""
    shape = with_depth(size.model.shape, text=2, vision=2)
    model = replace(size.model, shape=shape, dtype=F32)
    return replace(size, batch=batch, token_budget=token_budget, model=model)


# Visual tokens of a picture are (side / 28) ^ 2 at most: 16 to 64 on a CPU, 256 on a GPU. On a GPU
# both sides fit 80 GB, and a run takes seconds.
CONTRAST = {
    "test": Size(5, tiny(84), pictures(5, 0, 84), texts(8, spread=SPREAD), 60, BY_IMAGE),
    "cpu": Size(8, middle(168), pictures(16, 0, 168), texts(16, spread=SPREAD), 512, BY_IMAGE),
    "cuda": Size(32, large(448), pictures(64, 0, 448), texts(64, spread=SPREAD), 2560, BY_IMAGE),
}
CONTRAST[CUDA_IN_FLOAT32] = in_float32(CONTRAST["cuda"], batch=10, token_budget=1024)
# Micro-batches are those of the released scripts, but for warm-up on a GPU: 8 of its 16 fit. The
# scores of a dense mask over all patches of a batch do not: more than 100 GiB in 32 layers.
CAPTIONS = {
    "test": Size(4, tiny(84), pictures(9, 0, 84), NO_TEXTS, 80, DENSE),
    "cpu": Size(16, middle(140), pictures(16, 0, 140), NO_TEXTS, 1024, DENSE),
    "cuda": Size(8, large(448), pictures(64, 0, 448), NO_TEXTS, 8192, BY_IMAGE),
}
CAPTIONS[CUDA_IN_FLOAT32] = in_float32(CAPTIONS["cuda"], batch=4, token_budget=1024)
BRIDGE = {
    "test": Size(4, tiny(84), pictures(5, 8, 84), NO_TEXTS, 80, DENSE),
    "cpu": Size(8, middle(224), pictures(6, 24, 224), NO_TEXTS, 1024, DENSE),
    "cuda": Size(8, large(448), pictures(24, 64, 448), NO_TEXTS, 8192, BY_IMAGE),
}
BRIDGE[CUDA_IN_FLOAT32] = in_float32(BRIDGE["cuda"], batch=4, token_budget=1024)
ITEMS = {
    name: replace(tuned(size, "none"), peer_vision=BY_IMAGE) for name, size in CAPTIONS.items()
}
ITEMS["cpu"] = replace(ITEMS["cpu"], query=pictures(24, 0, 140))
ITEMS["cuda"] = replace(ITEMS["cuda"], batch=64)
# No padding and no adapter: what is left is how the cache is filled.
EVEN = texts(24, spread=0)
EVEN_TEXTS = {
    "test": Size(16, replace(tiny(56), tuning="full"), EVEN, EVEN, 400, BY_IMAGE),
    "cpu": Size(16, replace(middle(56), tuning="full"), EVEN, EVEN, 400, BY_IMAGE),
    "cuda": Size(64, large(56), texts(128, spread=0), texts(128, spread=0), 4096, BY_IMAGE),
}
EVEN_TEXTS[CUDA_IN_FLOAT32] = in_float32(EVEN_TEXTS["cuda"], batch=10, token_budget=1024)
SKEWED = texts(24, spread=0.8)
SKEWED_TEXTS = {
    "test": replace(ITEMS["test"], batch=24, query=texts(8, spread=0.8), token_budget=200),
    "cpu": replace(ITEMS["cpu"], batch=32, query=SKEWED),
    "cuda": replace(ITEMS["cuda"], batch=256, query=SKEWED, token_budget=16384),
}
SKEWED_TEXTS[CUDA_IN_FLOAT32] = in_float32(SKEWED_TEXTS["cuda"], batch=20, token_budget=256)
# By hand, not among `all`: the batch of the paper on one device.
WHOLE_BATCH = {
    **CONTRAST,
    "cpu": Size(1024, middle(112), pictures(16, 0, 112), texts(16, spread=SPREAD), 512, BY_IMAGE),
    "cuda": replace(CONTRAST["cuda"], batch=1024),
}
