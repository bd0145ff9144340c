"""Blank samples of assumed lengths, as a stage would pack them.

What a stage makes of a pair, how samples are packed and how a batch is cut are the code that
trains; only the lengths of texts and the sizes of images are made up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cocoa_pl.data.batch import SPECIAL, TEXT, VISUAL, Sample
from cocoa_pl.data.examples import Example, MakeSamples
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.sampler import mix
from cocoa_pl.errors import UserError

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


def rank_rows(
    make_samples: MakeSamples, lengths: Lengths, *, rows: int, merge_size: int, max_length: int
) -> list[list[Sample]]:
    """The samples of what one process gets for one step, row by row.

    Raises:
        UserError: if a sample is longer than the model's `max_length`.
    """
    made = [
        [
            _sample(example, lengths, merge_size=merge_size, role=role)
            for role, example in enumerate(
                make_samples(lengths.pair(row), np.random.default_rng(mix(0, row)))
            )
        ]
        for row in range(rows)
    ]
    longest = max(sample.num_tokens for row in made for sample in row)
    if longest > max_length:
        raise UserError(
            f"the assumed lengths make samples of {longest} tokens, more than "
            f"model.max_length={max_length}; lower lengths.text or model.max_pixels"
        )
    return made


def _sample(example: Example, lengths: Lengths, *, merge_size: int, role: int) -> Sample:
    """As `data.processor.Processor` lays a sample out, without ids, positions and pixels."""
    context, words = example
    before = _kinds(context, lengths)
    target = [TEXT] * len((words or "").split())
    kinds = np.array([*before, SPECIAL, *target], np.uint8)
    count = len(context.media)
    height, width = (side * merge_size for side in lengths.grid)
    return Sample(
        input_ids=np.zeros(len(kinds), np.int64),
        kinds=kinds,
        position_ids=np.broadcast_to(np.arange(len(kinds)), (3, len(kinds))),
        segment_lengths=(len(before), 1, len(target)),
        patches=np.empty((count * height * width, 0), np.uint8),
        grids=((1, height, width),) * count,
        key=0,
        row_id="assumed row",
        role=role,
    )


def _kinds(context: Item, lengths: Lengths) -> Sequence[int]:
    """Of the tokens; an image stands between two special tokens."""
    image = [SPECIAL, *[VISUAL] * lengths.image_tokens, SPECIAL]
    kinds: list[int] = []
    for rank, text in enumerate(context.text.split(IMAGE_SLOT)):
        kinds += image if rank else []
        kinds += [TEXT] * len(text.split())
    return kinds
