"""B6. What the vision tower reads of pictures: bytes cut on the processor and made floats on the
device, against the stock image processor for each sample.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.benchmark import SECONDS, Benchmark, Task, curve
from benchmarks.counting import Count, Counts
from benchmarks.models import MERGE, PATCH, SMALL, image_processor
from benchmarks.ours import wrapped
from benchmarks.timing import Run
from cocoa_pl.data.batch import Batch
from cocoa_pl.data.images import open_image
from cocoa_pl.data.processor import cut, resize

FRAMES = 2  # of a still image: one, repeated
STORED = (640, 480)  # of a picture on disk


@dataclass(frozen=True)
class Size:
    """Pictures of one size.

    Attributes:
        side: pixels of a side after resizing.
        stored: start from encoded files of `STORED` pixels, not from resized pictures.
        normalised: end with floats, all computed on the processor; otherwise with what leaves a
            data worker.
    """

    images: int
    side: int
    stored: bool
    normalised: bool


class Images(Task):
    """The work of a data worker, and where asked for, of the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.samples = size, size.images
        self.max_pixels = size.side**2
        self.stock: Any = image_processor(self.max_pixels)
        rng = np.random.default_rng(0)
        self.pictures = [photograph(rng, size) for _ in range(size.images)]
        self.device = torch.device("cpu")  # where a data worker is
        self.backbone = wrapped(
            SMALL,
            image_processor=self.stock,
            kernel="sdpa",
            device=self.device,
            dtype=torch.float32,
        )

    def peer(self) -> list[Tensor]:
        """(p, channels x frames x B) float32 of each picture."""
        found = []
        for picture in self.pictures:
            if self.size.stored:
                assert isinstance(picture, bytes)
                opened: Any = Image.open(io.BytesIO(picture)).convert("RGB")
            else:
                opened = np.asarray(picture)
            values = self.stock([opened], do_resize=self.size.stored, return_tensors="pt")
            found.append(values["pixel_values"])
        return found

    def ours(self) -> list[Tensor]:
        """(p, channels x B) uint8 of each picture, or its floats."""
        patches = [self._patches(picture) for picture in self.pictures]
        if not self.size.normalised:
            return patches
        return [self._floats(one) for one in patches]

    def _patches(self, picture: Image.Image | bytes) -> Tensor:
        if isinstance(picture, bytes):
            picture = resize(open_image(picture, where="a benchmark"), **self._resizing())
        return torch.from_numpy(cut(picture, patch_size=PATCH, merge_size=MERGE))

    def _resizing(self) -> dict[str, int]:
        return {
            "min_pixels": self.stock.size["shortest_edge"],
            "max_pixels": self.max_pixels,
            "factor": PATCH * MERGE,
            "resample": self.stock.resample,
        }

    def _floats(self, patches: Tensor) -> Tensor:
        """(p, channels x B) bytes -> (p, channels x frames x B), as `QwenVLBackbone` does it."""
        pixels = self.backbone.pixels(cast(Batch, SimpleNamespace(patches=patches)))
        channels = pixels.view(len(pixels), 3, 1, PATCH**2)
        return channels.expand(-1, -1, FRAMES, -1).flatten(1)

    def check(self) -> None:
        """Bit for bit, after what the device does."""
        for ours, peer in zip(self.ours(), self.peer(), strict=True):
            assert torch.equal(ours if self.size.normalised else self._floats(ours), peer)

    def floor(self) -> Run | None:
        """Pillow's decoding and resizing alone, where files are read."""
        if not self.size.stored:
            return None
        values = self._resizing()

        def run() -> None:
            for picture in self.pictures:
                assert isinstance(picture, bytes)
                resize(Image.open(io.BytesIO(picture)), **values)

        return run

    def counts(self) -> Counts:
        sizes = [
            sum(one.numel() * one.element_size() for one in side)
            for side in (self.peer(), [self._patches(picture) for picture in self.pictures])
        ]
        return {"bytes_to_the_device": Count(sizes[0], sizes[1])}


def photograph(rng: np.random.Generator, size: Size) -> Image.Image | bytes:
    """Smooth noise, which JPEG compresses about as well as a photograph."""
    coarse = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
    shown = STORED if size.stored else (size.side, size.side)
    picture = Image.fromarray(coarse).resize(shown, Image.Resampling.BICUBIC)
    if not size.stored:
        return picture
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


CPU = Size(4, 448, False, False)
AFTER_RESIZE = {"test": Size(2, 56, False, False), "cpu": CPU, "cuda": CPU}  # on the processor
PEER = "the collators of CoCoA and VLM2Vec: transformers' image processor, one sample at a time"


def _sizes(**changes: Any) -> dict[str, Size]:
    return {name: replace(size, **changes) for name, size in AFTER_RESIZE.items()}


BENCHMARK = Benchmark(
    id="B6",
    name="images",
    title="Image pipeline after resizing, 448 x 448",
    peer_label=PEER,
    noun="images",
    target=10,
    note="What a data worker does for each picture once it is resized. Bit-equal after the "
    "device's part.",
    sizes=AFTER_RESIZE,
    build=Images,
    curves=(
        curve(
            "pixels of a side",
            SECONDS,
            "side",
            {"test": (56, 84), "cpu": (224, 336, 448, 672), "cuda": (224, 336, 448, 672)},
            AFTER_RESIZE,
        ),
    ),
)

LARGE = replace(
    BENCHMARK,
    name="images_672",
    title="Image pipeline after resizing, 672 x 672",
    sizes={**_sizes(side=672), "test": Size(2, 84, False, False)},
    curves=(),
)

WITH_FLOATS = replace(
    BENCHMARK,
    name="images_on_one_core",
    title="Image pipeline with the device's part on the same core",
    target=None,
    note="As where there is no device: floats and repeated frames are made by the core that cuts.",
    sizes=_sizes(normalised=True),
    curves=(),
)

WHOLE_PATH = replace(
    BENCHMARK,
    name="images_whole_path",
    title="Image pipeline from a JPEG file, 448 x 448",
    target=None,
    note="640 x 480 pixels on disk. Both sides leave decoding and resizing to Pillow, and that is "
    "most of what is left.",
    sizes={**_sizes(stored=True), "test": Size(2, 56, True, False)},
    curves=(),
)
