"""Texts with images in, what is wrong with each of them out; no comparison between rows here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cocoa_pl.data.items import EvalSubset, Item, Pair
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.lengths import EOS, MARKERS, visual_tokens
from cocoa_pl.doctor.pictures import TINY_SIDE, Gallery, file_name

# What other projects write where an image belongs: here it is words, unless the row has the image.
_IMAGE_TAG = re.compile(r"<\|?(?:image|img)(?:[ _-]?\d+)?\|?>", re.IGNORECASE)

_Add = Callable[[str, str, str], None]  # kind, file, message


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a row, with the row's name."""

    row_id: str
    role: str
    item: Item


def sides_of_pair(pair: Pair) -> Iterator[Side]:
    """Query, positive and hard negatives."""
    yield Side(pair.row_id, "query", pair.query)
    yield Side(pair.row_id, "positive", pair.positive)
    for negative in pair.negatives:
        yield Side(pair.row_id, "negative", negative)


def sides_of_subset(subset: EvalSubset) -> Iterator[Side]:
    """Every distinct query and candidate once, named by the first row that holds it."""
    query_rows = np.zeros(len(subset.queries), dtype=np.int64)
    candidate_rows = np.zeros(len(subset.candidates), dtype=np.int64)
    for row in reversed(range(len(subset.row_ids))):
        query_rows[subset.query_index[row]] = row
        candidate_rows[subset.candidate_index[row]] = row
    for row, item in zip(query_rows.tolist(), subset.queries, strict=True):
        yield Side(subset.row_ids[row], "query", item)
    for row, item in zip(candidate_rows.tolist(), subset.candidates, strict=True):
        yield Side(subset.row_ids[row], "candidate", item)


class SideCheck:
    """Checks sides against the opened images and, where there is one, a model's processor.

    Args:
        processor: of the model; None leaves everything about tokens out.
    """

    def __init__(self, gallery: Gallery, processor: Processor | None) -> None:
        self.gallery = gallery
        self.processor = processor
        self.tokens = visual_tokens(gallery, processor) if processor else None

    def __call__(self, side: Side, findings: Findings, *, part: str) -> None:
        """Add what is wrong with one side of a row."""

        def add(kind: str, file: str, message: str) -> None:
            said = f"{side.row_id}, {side.role}: {message}"
            findings.add(Finding(kind, part, side.row_id, side.role, file, said))

        if found := _IMAGE_TAG.search(side.item.text):
            add("image_tag", "", f"the text holds {found[0]}, which is read as words")
        numbers = [self.gallery.number(image) for image in side.item.media]
        for number, image in zip(numbers, side.item.media, strict=True):
            self._check_image(number, file_name(image), add)
        if self.processor and self.tokens is not None and numbers:
            tokens = self.tokens[numbers]
            needed = int(tokens.sum()) + MARKERS * len(numbers) + EOS
            if (tokens >= 0).all() and needed > self.processor.max_length:
                add(
                    "images_exceed_length",
                    file_name(side.item.media[0]),
                    f"images and the end token take {needed} tokens, "
                    f"more than max_length={self.processor.max_length}",
                )

    def _check_image(self, number: int, file: str, add: _Add) -> None:
        fault = self.gallery.faults.get(number)
        if fault is not None:
            add(fault.kind, file, fault.message)
            return
        width, height = self.gallery.sizes[number].tolist()
        if min(width, height) < TINY_SIDE:
            size = f"image {file} is {width} x {height} pixels".replace("  ", " ")
            add("tiny_image", file, size)
