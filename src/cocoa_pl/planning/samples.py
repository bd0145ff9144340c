"""Batches of blank samples of assumed lengths, packed as a stage would pack them.

What a stage makes of a pair, how samples are packed and how a batch is cut are the code that
trains; only the lengths of texts and the sizes of images are made up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.data.examples import MakeSamples, Sample
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.errors import UserError
from cocoa_pl.randomness import mix

BLANK_IMAGE = b""


@dataclass(frozen=True)
class Lengths:
    """What a row of the training data is taken to look like; the same for all rows.

    Args:
        text: text tokens on each side of a pair.
        images_per_query, images_per_positive: may be fractions; then some rows have one more.
        negatives: hard negatives of a row, each like a positive.
        grid: height and width of an image in visual tokens.
        row_bytes, image_bytes: of a row in host memory, and of an image file.
    """

    text: int
    images_per_query: float
    images_per_positive: float
    negatives: int
    grid: tuple[int, int]
    row_bytes: int
    image_bytes: int

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def pair(self, row: int) -> Pair:
        """A row whose words are one token each."""
        return Pair(
            query=self._item(row, self.images_per_query),
            positive=self._item(row, self.images_per_positive),
            negatives=(self._item(row, self.images_per_positive),) * self.negatives,
            subset="assumed",
            row_id=f"assumed row {row}",
        )

    def _item(self, row: int, images: float) -> Item:
        # Fractions spread evenly: of 0.25 every fourth row has an image.
        count = math.floor((row + 1) * images) - math.floor(row * images)
        return Item(" ".join([IMAGE_SLOT] * count + ["word"] * self.text), (BLANK_IMAGE,) * count)


def grid_of(max_pixels: int, *, token_side: int) -> tuple[int, int]:
    """The largest square image that the image processor lets through, in visual tokens.

    Args:
        token_side: pixels of a side of a visual token.
    """
    side = max(1, math.isqrt(max_pixels) // token_side)
    return side, side


def grid_of_tokens(count: int) -> tuple[int, int]:
    """The least elongated grid with this many visual tokens."""
    height = next(side for side in range(math.isqrt(count), 0, -1) if count % side == 0)
    return height, count // height


def rank_batch(
    make_samples: MakeSamples,
    lengths: Lengths,
    *,
    rows: int,
    merge_size: int,
    max_length: int,
) -> Batch:
    """What one process gets for one step: samples role by role, as the collator packs them.

    Raises:
        UserError: if a sample is longer than the model's `max_length`.
    """
    made = [make_samples(lengths.pair(row), mix(0, row)) for row in range(rows)]
    roles = range(max(len(samples) for samples in made))
    ordered = [samples[role] for role in roles for samples in made if len(samples) > role]
    encoded = [
        _encode(sample, lengths, merge_size=merge_size, seed=number)
        for number, sample in enumerate(ordered)
    ]
    longest = max(sum(sample.segment_lengths) for sample in encoded)
    if longest > max_length:
        raise UserError(
            f"the assumed lengths make samples of {longest} tokens, more than "
            f"model.max_length={max_length}; lower lengths.text or model.max_pixels"
        )
    return pack(encoded)


def _encode(sample: Sample, lengths: Lengths, *, merge_size: int, seed: int) -> Encoded:
    """As `data.tokenize.Processor.encode` lays a sample out, without ids, positions and pixels."""
    kinds = _kinds(sample.context, lengths)
    target = [] if sample.target is None else [1] * len(sample.target.split())
    kind = torch.tensor([*kinds, 0, *target])
    count = len(sample.context.media)
    height, width = (side * merge_size for side in lengths.grid)
    return Encoded(
        input_ids=torch.zeros(len(kind), dtype=torch.int64),
        position_ids=torch.arange(len(kind)).expand(3, -1),
        text_mask=kind == 1,
        image_mask=kind == 2,
        segment_lengths=(len(kinds), 1, len(target)),
        patches=torch.empty(count * height * width, 0, dtype=torch.uint8),
        grids=torch.tensor([[1, height, width]] * count, dtype=torch.int64).view(-1, 3),
        key=seed,
        seed=seed,
        row_id="assumed row",
    )


def _kinds(context: Item, lengths: Lengths) -> Sequence[int]:
    """0 special, 1 text, 2 visual; an image stands between two special tokens."""
    image = [0, *[2] * lengths.image_tokens, 0]
    kinds: list[int] = []
    for rank, text in enumerate(context.text.split(IMAGE_SLOT)):
        kinds += image if rank else []
        kinds += [1] * len(text.split())
    return kinds
