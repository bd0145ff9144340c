"""Samples of skewed lengths that follow from a seed, for both sides: what the project's processor
makes of them, and rows of a data set for the peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor

from benchmarks.models import MERGE, PATCH, Shape, image_processor, special_ids
from benchmarks.peers.inputs import IGNORED, Row
from cocoa_pl.data.batch import VISUAL, Sample
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor


@dataclass(frozen=True)
class Drawn:
    """What a data set gives: ids instead of texts, because tokenizers cost both sides the same."""

    picture: Image | None
    text: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """How samples are drawn; lengths are log-normal, at least 2 tokens.

    Attributes:
        text, target: median tokens; a target of 0 means none.
        spread: standard deviation of the logarithm of a length.
        sides: pixels of pictures, drawn for each side of each picture; empty for texts alone.
        max_pixels: of a picture after resizing.
    """

    text: int
    target: int
    spread: float
    sides: tuple[int, ...]
    max_pixels: int


def draw(mix: Mix, count: int, *, shape: Shape, seed: int) -> list[Drawn]:
    """Samples of one kind."""
    rng = np.random.default_rng(seed)
    ordinary = min(special_ids(shape).values())

    def ids(median: int) -> tuple[int, ...]:
        if not median:
            return ()
        length = max(2, round(median * float(np.exp(mix.spread * rng.normal()))))
        return tuple(rng.integers(ordinary, size=length).tolist())

    def picture() -> Image | None:
        if not mix.sides:
            return None
        coarse = fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8))
        size = (int(rng.choice(mix.sides)), int(rng.choice(mix.sides)))
        return coarse.resize(size, Resampling.BICUBIC)

    return [Drawn(picture(), ids(mix.text), ids(mix.target)) for _ in range(count)]


class Ids:
    """A tokenizer of texts that are ids already."""

    def __init__(self, shape: Shape) -> None:
        ids = special_ids(shape)
        self.eos_token_id = ids["eos_token_id"]
        self._special = {
            "<|image_pad|>": ids["image_token_id"],
            "<|vision_start|>": ids["vision_start_token_id"],
            "<|vision_end|>": ids["vision_end_token_id"],
        }
        self._length = shape.vocabulary - 1  # the last row is the mask token's

    def __len__(self) -> int:
        return self._length

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._special[token]

    def __call__(self, text: str, **_: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def make_processor(shape: Shape, max_pixels: int) -> Processor:
    """Of texts that are ids, and of pictures."""
    return Processor(
        Ids(shape),
        image_processor(max_pixels),
        max_length=1 << 15,
        min_pixels=(2 * PATCH * MERGE) ** 2,
        max_pixels=max_pixels,
        num_token_rows=shape.vocabulary,
    )


def process(drawn: Drawn, processor: Processor, number: int, role: int = 0) -> Sample:
    """Tokens and patches, as a data worker makes them: picture, text, EOS, target.

    Args:
        number: of the sample, its content's key.
    """
    slot, media = (IMAGE_SLOT, (drawn.picture,)) if drawn.picture is not None else ("", ())
    text, target = (" ".join(map(str, ids)) for ids in (drawn.text, drawn.target))
    item, row_id = Item(slot + text, media), f"sample {number}"
    return processor(item, target or None, key=number, row_id=row_id, role=role)


def row_of(drawn: Drawn, sample: Sample, noisy: Tensor | None = None) -> Row:
    """The same sample for the peer, with the same tokens and patches hidden.

    Args:
        noisy: (p, B) float, normalised pixels of its patches, noise where they are hidden; None
            where none is.
    """
    visual = torch.from_numpy(sample.kinds == VISUAL)
    labels = torch.full(visual.shape, IGNORED)
    labels[sample.hidden] = torch.from_numpy(sample.targets)
    hidden = None
    if drawn.picture is not None:
        tokens = torch.zeros(int(visual.sum()), dtype=torch.bool)
        tokens[sample.hidden_visual] = True
        hidden = tokens.repeat_interleave(MERGE**2)
    return Row(
        input_ids=torch.from_numpy(sample.input_ids),
        image_mask=visual,
        labels=labels,
        segment_lengths=torch.tensor(sample.segment_lengths),
        picture=drawn.picture,
        hidden_patches=hidden,
        noise=None if noisy is None or hidden is None else noisy[hidden],
    )
