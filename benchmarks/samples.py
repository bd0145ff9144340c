"""Samples of skewed lengths for both sides: packed for ours, as rows of a data set for the peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor

from benchmarks.models import MERGE, PATCH, Shape, special_ids
from benchmarks.peers.inputs import IGNORED, Row
from cocoa_pl.batch import Batch, Encoded
from cocoa_pl.corruption import Corrupted
from cocoa_pl.data.patches import cut, resize
from cocoa_pl.positions import mrope_positions


@dataclass(frozen=True)
class Sample:
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


def draw(mix: Mix, count: int, *, shape: Shape, seed: int) -> list[Sample]:
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

    return [Sample(picture(), ids(mix.text), ids(mix.target)) for _ in range(count)]


def encode(sample: Sample, *, shape: Shape, max_pixels: int, resample: int, seed: int) -> Encoded:
    """What `data.tokenize.Processor` makes of an item, from ids: picture, text, EOS, target."""
    ids = special_ids(shape)
    patches = torch.empty(0, 3 * PATCH**2, dtype=torch.uint8)
    grids: list[tuple[int, int, int]] = []
    head: list[int] = []
    if sample.picture is not None:
        resized = resize(
            sample.picture,
            min_pixels=(2 * PATCH * MERGE) ** 2,
            max_pixels=max_pixels,
            factor=PATCH * MERGE,
            resample=resample,
        )
        patches = torch.from_numpy(cut(resized, patch_size=PATCH, merge_size=MERGE))
        grids = [(1, resized.height // PATCH, resized.width // PATCH)]
        visual = len(patches) // MERGE**2
        head = [
            ids["vision_start_token_id"],
            *[ids["image_token_id"]] * visual,
            ids["vision_end_token_id"],
        ]
    context = [*head, *sample.text]
    input_ids = torch.tensor([*context, ids["eos_token_id"], *sample.target])
    rest = 1 + len(sample.text) + 1 + len(sample.target)  # behind the picture
    spans: list[int | tuple[int, int, int]] = [1, grids[0], rest] if grids else [rest - 1]
    return Encoded(
        input_ids=input_ids,
        position_ids=mrope_positions(spans, merge_size=MERGE),
        text_mask=input_ids < min(ids.values()),
        image_mask=input_ids == ids["image_token_id"],
        segment_lengths=(len(context), 1, len(sample.target)),
        patches=patches,
        grids=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        key=abs(hash((sample.text, sample.target))),  # of numbers: the same in every process
        seed=seed,
        row_id=f"sample {seed}",
    )


def rows_of(samples: Sequence[Sample], batch: Batch) -> list[Row]:
    """The same samples for the peer, before anything is hidden."""
    nothing = torch.zeros_like(batch.image_mask)
    return _rows(samples, batch, batch.input_ids, nothing, nothing)


def corrupted_rows(samples: Sequence[Sample], seen: Corrupted, noisy: Tensor) -> list[Row]:
    """The same samples with the same tokens and patches hidden.

    Args:
        noisy: (P, B) float, normalised pixels of all patches, noise where they are hidden.
    """
    rows = _rows(samples, seen.batch, seen.labels, seen.token_mask, seen.patch_mask)
    pixels = noisy.split(seen.batch.patches_per_sample.tolist())
    return [
        row if row.hidden_patches is None else row.with_noise(own[row.hidden_patches])
        for row, own in zip(rows, pixels, strict=True)
    ]


def _rows(
    samples: Sequence[Sample], batch: Batch, labels: Tensor, token_mask: Tensor, patch_mask: Tensor
) -> list[Row]:
    lengths = batch.lengths.tolist()
    fields = (batch.input_ids, batch.image_mask, labels, token_mask, patch_mask)
    found = []
    for place, (sample, *own) in enumerate(
        zip(samples, *(field.split(lengths) for field in fields), strict=True)
    ):
        ids, images, said, hidden, patches = own
        found.append(
            Row(
                input_ids=ids,
                image_mask=images,
                labels=said.where(hidden, IGNORED),
                segment_lengths=batch.segment_lengths[place],
                picture=sample.picture,
                hidden_patches=(
                    patches[images].repeat_interleave(MERGE**2) if sample.picture else None
                ),
                noise=None,
            )
        )
    return found
