"""Rows compared with each other and with the evaluation, by what they hold and not by their names.

Pictures count by the hash of their files, so that a copy under another name is the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.pictures import Gallery, file_name


def pair_keys(rows: Sequence[Pair], gallery: Gallery) -> np.ndarray:
    """int64 [N, 2]: identities of each row's query and positive by content."""
    keys = np.empty((len(rows), 2), dtype=np.int64)
    for number, pair in enumerate(rows):
        keys[number] = gallery.content_key(pair.query), gallery.content_key(pair.positive)
    return keys


def check_negatives(
    pair: Pair, keys: np.ndarray, gallery: Gallery, findings: Findings, *, part: str
) -> None:
    """A hard negative that is its row's own positive (or query) teaches the opposite.

    Args:
        keys: int64 [2], the row's `pair_keys`.
    """
    for place, negative in enumerate(pair.negatives):
        if gallery.content_key(negative) == keys[1]:
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


class Exam:
    """What an evaluation holds: for finding training rows that are in it.

    Attributes:
        queries, pairs, images: identities by content, and the row that holds them.
    """

    def __init__(self, name: str, gallery: Gallery) -> None:
        self.name = name
        self.gallery = gallery
        self.queries: dict[int, str] = {}
        self.pairs: dict[tuple[int, int], str] = {}
        self.images: dict[int, str] = {}

    @classmethod
    def of_pairs(cls, name: str, rows: Sequence[Pair], gallery: Gallery) -> Exam:
        exam = cls(name, gallery)
        for pair, (query, positive) in zip(rows, pair_keys(rows, gallery).tolist(), strict=True):
            exam._add(query, positive, pair.row_id)
            exam._add_images(pair, pair.row_id)
        return exam

    @classmethod
    def of_subsets(cls, name: str, subsets: Sequence[EvalSubset], gallery: Gallery) -> Exam:
        """Queries and right answers; wrong candidates do not count."""
        exam = cls(name, gallery)
        for subset in subsets:
            for row, row_id in enumerate(subset.row_ids):
                query = subset.queries[subset.query_index[row]]
                positive = subset.candidates[subset.candidate_index[row][0]]
                keys = gallery.content_key(query), gallery.content_key(positive)
                exam._add(*keys, row_id)
                exam._add_images(Pair(query, positive, (), subset.name, row_id), row_id)
        return exam

    def check(self, pair: Pair, keys: tuple[int, int], findings: Findings, *, part: str) -> None:
        """Add the strongest overlap of one training row: its pair, its query, or an image."""

        def add(kind: str, what: str, where: str, file: str = "") -> None:
            message = f"{pair.row_id}: {what} in {self.name}, {where}"
            findings.add(Finding(kind, part, pair.row_id, "", file, message))

        if where := self.pairs.get(keys):
            add("overlap_pair", "query and positive are", where)
        elif where := self.queries.get(keys[0]):
            add("overlap_query", "the query is", where)
        else:
            images = [image for item in (pair.query, pair.positive) for image in item.media]
            for image in images:
                digest = int(self.gallery.digests[self.gallery.number(image)])
                if where := self.images.get(digest):
                    add("overlap_image", "an image is", where, file_name(image))
                    return

    def _add(self, query: int, positive: int, row_id: str) -> None:
        self.queries.setdefault(query, row_id)
        self.pairs.setdefault((query, positive), row_id)

    def _add_images(self, pair: Pair, row_id: str) -> None:
        for item in (pair.query, pair.positive):
            for image in item.media:
                number = self.gallery.number(image)
                if number not in self.gallery.faults:
                    self.images.setdefault(int(self.gallery.digests[number]), row_id)
