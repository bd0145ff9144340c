"""Parsed pairs in, the same pairs in columns out: a few dozen bytes a row beside its text.

A corpus of millions of rows as Python objects costs a kilobyte each and is copied into every loader
worker as soon as reference counts are touched. Here the texts lie in Arrow buffers and the rest in
integer arrays, which workers share; a `Pair` is made when a row is asked for. Encoded images that
stand in the rows themselves lie in Arrow buffers too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from cocoa_pl.data.images import ImageSource
from cocoa_pl.data.items import Item, Pair

NO_IMAGE = -1
_FIRST_ENCODED = -2  # and downwards: numbers of images that are bytes
_PART_ROWS = 1 << 14  # few enough that what is needed to build a part is soon given back
_PART_BYTES = 1 << 26  # of encoded images


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of one subset. Sides are `[rows, 2]` text and image: numbers in `strings`, where an
    image is a path; an image below `NO_IMAGE` is in `encoded`, counted downwards.
    """

    subset: str
    label: str  # row ids are this, a blank and the row's number
    strings: pa.LargeStringArray
    encoded: pa.LargeBinaryArray
    numbers: np.ndarray  # int32 [N]
    queries: np.ndarray  # int32 [N, 2]
    positives: np.ndarray  # int32 [N, 2]
    negatives: np.ndarray  # int32 [M, 2]
    negative_ends: np.ndarray  # int32 [N]

    def pairs(self, rows: np.ndarray) -> Iterator[Pair]:
        """The rows with these numbers; faster than one by one where they are many."""
        if len(rows) < len(self.numbers) // 8:
            yield from map(self.pair, rows.tolist())
            return
        strings = self.strings.to_pylist()

        def item(side: list[int]) -> Item:
            text, image = side
            if image >= 0:
                return Item(strings[text], (Path(strings[image]),))
            return Item(strings[text], self._encoded_image(image))

        starts = np.concatenate([[0], self.negative_ends[:-1]])
        for number, query, positive, start, end in zip(
            self.numbers[rows].tolist(),
            self.queries[rows].tolist(),
            self.positives[rows].tolist(),
            starts[rows].tolist(),
            self.negative_ends[rows].tolist(),
            strict=True,
        ):
            negatives = self.negatives[start:end].tolist() if start < end else ()
            yield Pair(
                query=item(query),
                positive=item(positive),
                negatives=tuple(item(side) for side in negatives),
                subset=self.subset,
                row_id=f"{self.label} {number}",
            )

    def pair(self, row: int) -> Pair:
        start = int(self.negative_ends[row - 1]) if row else 0
        negatives = self.negatives[start : int(self.negative_ends[row])]
        return Pair(
            query=self._item(self.queries[row]),
            positive=self._item(self.positives[row]),
            negatives=tuple(self._item(side) for side in negatives),
            subset=self.subset,
            row_id=f"{self.label} {self.numbers[row]}",
        )

    def _item(self, side: np.ndarray) -> Item:
        text, image = side.tolist()
        path = (Path(self.strings[image].as_py()),) if image >= 0 else None
        return Item(self.strings[text].as_py(), path or self._encoded_image(image))

    def _encoded_image(self, image: int) -> tuple[bytes, ...]:
        return () if image == NO_IMAGE else (self.encoded[_FIRST_ENCODED - image].as_py(),)


class PairTable(Sequence[Pair]):
    """Pairs whose sides have at most one image; rows are made on demand, never kept.

    Slices and `select` share the columns with the table they come from.
    """

    def __init__(self, parts: Sequence[_Part], part_of: np.ndarray, row_of: np.ndarray) -> None:
        self._parts = tuple(parts)
        self._part_of = part_of  # int32 [N]
        self._row_of = row_of  # int32 [N]

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> PairTable:
        """The pairs in their order; rows of one subset and label should follow each other."""
        parts: list[_Part] = []
        builder: _Builder | None = None
        for pair in pairs:
            label = pair.row_id.rpartition(" ")[0]
            if (
                builder is None
                or (builder.subset, builder.label) != (pair.subset, label)
                or builder.is_full
            ):
                parts += [builder.finish()] if builder else []
                builder = _Builder(pair.subset, label)
            builder.add(pair)
        parts += [builder.finish()] if builder else []
        return cls._whole(parts)

    @classmethod
    def concatenated(cls, tables: Sequence[PairTable]) -> PairTable:
        """The rows of all tables, one table after the other."""
        parts = [part for table in tables for part in table._parts]
        offsets = np.cumsum([0, *[len(table._parts) for table in tables]])
        shifted = [t._part_of + o for t, o in zip(tables, offsets[:-1].tolist(), strict=True)]
        return cls(
            parts,
            np.concatenate([np.empty(0, np.int32), *shifted]).astype(np.int32),
            np.concatenate([np.empty(0, np.int32), *[table._row_of for table in tables]]),
        )

    @classmethod
    def _whole(cls, parts: Sequence[_Part]) -> PairTable:
        sizes = [len(part.numbers) for part in parts]
        ranges = [np.arange(size, dtype=np.int32) for size in sizes]
        return cls(
            parts,
            np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
            np.concatenate([np.empty(0, np.int32), *ranges]),
        )

    def select(self, rows: np.ndarray) -> PairTable:
        """The rows at these positions, in this order."""
        return PairTable(self._parts, self._part_of[rows], self._row_of[rows])

    def subset_codes(self) -> tuple[list[str], np.ndarray]:
        """Names of the subsets in order of occurrence, and int32 [N], each row's place there."""
        used, first = np.unique(self._part_of, return_index=True)
        names = list(dict.fromkeys(self._parts[part].subset for part in used[np.argsort(first)]))
        code_of_part = np.zeros(len(self._parts), dtype=np.int32)
        for part in used:
            code_of_part[part] = names.index(self._parts[part].subset)
        return names, code_of_part[self._part_of]

    def has_images(self) -> np.ndarray:
        """bool [N, 2]: whether a row's query and whether its positive holds an image."""
        found = np.zeros((len(self), 2), dtype=bool)
        for part, here in self._runs():
            rows = self._row_of[here]
            found[here, 0] = part.queries[rows, 1] != NO_IMAGE
            found[here, 1] = part.positives[rows, 1] != NO_IMAGE
        return found

    def _runs(self) -> Iterator[tuple[_Part, slice]]:
        """Stretches of rows that lie in one part."""
        bounds = [0, *(np.flatnonzero(np.diff(self._part_of)) + 1).tolist(), len(self)]
        for start, stop in pairwise(bounds):
            if start < stop:
                yield self._parts[self._part_of[start]], slice(start, stop)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, texts included."""
        columns = [
            column
            for part in self._parts
            for column in (part.strings, part.encoded, part.numbers, part.queries, part.positives)
        ]
        columns += [c for part in self._parts for c in (part.negatives, part.negative_ends)]
        return sum(int(column.nbytes) for column in (*columns, self._part_of, self._row_of))

    def __len__(self) -> int:
        return len(self._row_of)

    def __iter__(self) -> Iterator[Pair]:
        for part, here in self._runs():
            yield from part.pairs(self._row_of[here])

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> PairTable: ...

    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._parts[self._part_of[index]].pair(int(self._row_of[index]))


class _Builder:
    """Collects rows of one part; equal texts and images are kept once."""

    def __init__(self, subset: str, label: str) -> None:
        self.subset = subset
        self.label = label
        self._codes: dict[str, int] = {}
        self._encoded: dict[bytes, int] = {}
        self._encoded_bytes = 0
        self._numbers, self._queries, self._positives = array("i"), array("i"), array("i")
        self._negatives, self._negative_ends = array("i"), array("i")

    @property
    def is_full(self) -> bool:
        return len(self._numbers) == _PART_ROWS or self._encoded_bytes >= _PART_BYTES

    def add(self, pair: Pair) -> None:
        self._numbers.append(int(pair.row_id.rpartition(" ")[2]))
        self._queries.extend(self._side(pair.query))
        self._positives.extend(self._side(pair.positive))
        for negative in pair.negatives:
            self._negatives.extend(self._side(negative))
        self._negative_ends.append(len(self._negatives) // 2)

    def finish(self) -> _Part:
        def sides(values: array[int]) -> np.ndarray:
            return np.array(values, dtype=np.int32).reshape(-1, 2)

        return _Part(
            subset=self.subset,
            label=self.label,
            strings=pa.array(list(self._codes), pa.large_string()),
            encoded=pa.array(list(self._encoded), pa.large_binary()),
            numbers=np.array(self._numbers, dtype=np.int32),
            queries=sides(self._queries),
            positives=sides(self._positives),
            negatives=sides(self._negatives),
            negative_ends=np.array(self._negative_ends, dtype=np.int32),
        )

    def _side(self, item: Item) -> tuple[int, int]:
        assert len(item.media) <= 1, "readers of tables give a side one image at most"
        text = self._codes.setdefault(item.text, len(self._codes))
        return text, self._image(item.media[0]) if item.media else NO_IMAGE

    def _image(self, image: ImageSource) -> int:
        if isinstance(image, Path):
            return self._codes.setdefault(str(image), len(self._codes))
        assert isinstance(image, bytes), "readers of tables open no images"
        if image not in self._encoded:
            self._encoded[image] = len(self._encoded)
            self._encoded_bytes += len(image)
        return _FIRST_ENCODED - self._encoded[image]


def subset_codes(pairs: Sequence[Pair]) -> tuple[list[str], np.ndarray]:
    """Names of the subsets in order of occurrence, and int32 [N], each row's place among them."""
    if isinstance(pairs, PairTable):
        return pairs.subset_codes()
    places: dict[str, int] = {}
    codes = [places.setdefault(pair.subset, len(places)) for pair in pairs]
    return list(places), np.array(codes, dtype=np.int32)


def has_images(pairs: Sequence[Pair]) -> np.ndarray:
    """bool [N, 2]: whether a row's query and whether its positive holds images."""
    if isinstance(pairs, PairTable):
        return pairs.has_images()
    held = [(bool(pair.query.media), bool(pair.positive.media)) for pair in pairs]
    return np.array(held, dtype=bool).reshape(-1, 2)


def select(pairs: Sequence[Pair], rows: np.ndarray) -> Sequence[Pair]:
    """The pairs at these positions: a table of a table, a list of anything else."""
    if isinstance(pairs, PairTable):
        return pairs.select(rows)
    return [pairs[row] for row in rows.tolist()]
