"""Checks of rows: each side alone, negatives, several positives, and leakage into an evaluation.

Rows are compared by what they hold: an image counts by the hash of its file, so that a copy under
another name is the same image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cocoa_pl.data.items import EvalSubset, Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.images import TINY_SIDE, DistinctImages, file_name
from cocoa_pl.doctor.lengths import EOS, MARKERS, visual_tokens

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

    def __init__(self, images: DistinctImages, processor: Processor | None) -> None:
        self.images = images
        self.processor = processor
        self.tokens = visual_tokens(images, processor) if processor else None

    def __call__(self, side: Side, findings: Findings, *, part: str) -> None:
        """Add what is wrong with one side of a row."""

        def add(kind: str, file: str, message: str) -> None:
            text = f"{side.row_id}, {side.role}: {message}"
            findings.add(Finding(kind, part, side.row_id, side.role, file, text))

        if found := _IMAGE_TAG.search(side.item.text):
            add("image_tag", "", f"the text holds {found[0]}, which is read as words")
        numbers = [self.images.number(image) for image in side.item.media]
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
        fault = self.images.faults.get(number)
        if fault is not None:
            add(fault.kind, file, fault.message)
            return
        width, height = self.images.sizes[number].tolist()
        if min(width, height) < TINY_SIDE:
            size = f"image {file} is {width} x {height} pixels".replace("  ", " ")
            add("tiny_image", file, size)


def pair_keys(rows: Sequence[Pair], images: DistinctImages) -> np.ndarray:
    """int64 [N, 2]: identities of each row's query and positive by content."""
    keys = np.empty((len(rows), 2), dtype=np.int64)
    for number, pair in enumerate(rows):
        keys[number] = images.content_key(pair.query), images.content_key(pair.positive)
    return keys


def check_negatives(
    pair: Pair, keys: np.ndarray, images: DistinctImages, findings: Findings, *, part: str
) -> None:
    """A hard negative that is its row's own positive (or query) teaches the opposite.

    Args:
        keys: int64 [2], the row's `pair_keys`.
    """
    for place, negative in enumerate(pair.negatives):
        if images.content_key(negative) == keys[1]:
            message = f"{pair.row_id}: negative {place} is the positive itself"
            file = file_name(negative.media[0]) if negative.media else ""
            findings.add(
                Finding("negative_is_positive", part, pair.row_id, "negative", file, message)
            )


def check_several_positives(
    rows: Sequence[Pair], keys: np.ndarray, findings: Findings, *, part: str
) -> None:
    """Queries to which several positives are right."""
    queries, counts = np.unique(np.unique(keys, axis=0)[:, 0], return_counts=True)
    positives = dict(zip(queries[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True))
    for row in np.flatnonzero(np.isin(keys[:, 0], queries[counts > 1])).tolist():
        row_id, count = rows[row].row_id, positives[int(keys[row, 0])]
        message = f"{row_id}: its query has {count} different positives"
        findings.add(Finding("several_positives", part, row_id, "query", "", message))


class LeakageCheck:
    """Finds training rows that are in an evaluation, by content.

    Args:
        name: of the evaluation.
    """

    def __init__(self, name: str, images: DistinctImages) -> None:
        self.name = name
        self.images = images
        # By content: the row of the evaluation that holds it.
        self.row_of_query: dict[int, str] = {}
        self.row_of_pair: dict[tuple[int, int], str] = {}
        self.row_of_image: dict[int, str] = {}

    @classmethod
    def of_pairs(cls, name: str, rows: Sequence[Pair], images: DistinctImages) -> LeakageCheck:
        check = cls(name, images)
        for pair in rows:
            check._add(pair.query, pair.positive, pair.row_id)
        return check

    @classmethod
    def of_subsets(
        cls, name: str, subsets: Sequence[EvalSubset], images: DistinctImages
    ) -> LeakageCheck:
        """Queries and right answers; wrong candidates do not count."""
        check = cls(name, images)
        for subset in subsets:
            for row, row_id in enumerate(subset.row_ids):
                query = subset.queries[subset.query_index[row]]
                check._add(query, subset.candidates[subset.candidate_index[row][0]], row_id)
        return check

    def check(self, pair: Pair, keys: tuple[int, int], findings: Findings, *, part: str) -> None:
        """Add the strongest overlap of one training row: its pair, its query, or an image."""

        def add(kind: str, what: str, where: str, file: str = "") -> None:
            message = f"{pair.row_id}: {what} in {self.name}, {where}"
            findings.add(Finding(kind, part, pair.row_id, "", file, message))

        if where := self.row_of_pair.get(keys):
            add("overlap_pair", "query and positive are", where)
        elif where := self.row_of_query.get(keys[0]):
            add("overlap_query", "the query is", where)
        else:
            for image in (*pair.query.media, *pair.positive.media):
                digest = int(self.images.digests[self.images.number(image)])
                if where := self.row_of_image.get(digest):
                    add("overlap_image", "an image is", where, file_name(image))
                    return

    def _add(self, query: Item, positive: Item, row_id: str) -> None:
        keys = self.images.content_key(query), self.images.content_key(positive)
        self.row_of_query.setdefault(keys[0], row_id)
        self.row_of_pair.setdefault(keys, row_id)
        for image in (*query.media, *positive.media):
            number = self.images.number(image)
            if number not in self.images.faults:
                self.row_of_image.setdefault(int(self.images.digests[number]), row_id)
