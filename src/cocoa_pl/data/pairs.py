"""Rows that are pairs: which, and what of them is known without making them.

`datasets` keeps a file's rows in Arrow on disk, memory-mapped and so shared by all processes;
beside them a row costs 22 bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import xxhash

from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.readers import as_row, open_file
from cocoa_pl.data.rows import RowErrors, RowFormat
from cocoa_pl.errors import UserError

_BLOCK = 100  # rows in memory together; they may hold images

# Of a pair: its number, counted over all parts; its subset's place among the names; its
# `group_key`; whether its query and its positive hold media.
_Known = np.dtype([("number", "i8"), ("subset", "i4"), ("group", "i8"), ("has_media", "?", (2,))])


@dataclass(eq=False)
class FileRows(Sequence[Pair]):
    """A file's rows.

    Args:
        label, first: row n is called `label {first + n}` in messages.
    """

    data: datasets.Dataset
    form: RowFormat
    subset: str
    label: str
    first: int = 0

    def row_id(self, number: int) -> str:
        return f"{self.label} {self.first + number}"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: Any) -> Any:
        """The row's pair; a row that is none was left out by `read`."""
        (row,) = map(as_row, self.data.data.fast_slice(number, 1).to_pylist())
        return self.form.pair(row, row_id=self.row_id(number), subset=self.subset, is_known=True)

    def contents(self) -> Iterator[object]:
        """All rows as they stand there."""
        for start in range(0, len(self), _BLOCK):
            yield from map(as_row, self.data.data.fast_slice(start, _BLOCK).to_pylist())

    @cached_property
    def digest(self) -> bytes:
        """Of all content, however it is cut into chunks and files."""
        table = self.data.data
        digest = xxhash.xxh3_128(str(table.schema.remove_metadata()).encode())
        for start in range(0, len(self), _BLOCK):
            block = table.fast_slice(start, _BLOCK)
            # Taken rows lie in buffers of their own, whatever lay around them.
            block = block.take(np.arange(len(block))).combine_chunks()
            for batch in block.to_batches():
                digest.update(batch.serialize())
        return digest.digest()


class Pairs(Sequence[Pair]):
    """Some rows of some parts, in an order.

    Args:
        parts: rows of files, or pairs in memory.
        names: of subsets.
        known: `_Known` [N], of each pair.
    """

    def __init__(
        self, parts: Sequence[Sequence[Pair]], names: Sequence[str], known: np.ndarray
    ) -> None:
        self.parts, self.names, self.known = tuple(parts), list(names), known
        self._starts = list(accumulate(map(len, parts), initial=0))

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Pairs:
        """Any pairs; those that are `Pairs` already as they are."""
        if isinstance(pairs, Pairs):
            return pairs
        names = {pair.subset: None for pair in pairs}
        places = {name: place for place, name in enumerate(names)}
        known = [(n, places[pair.subset], *_known(pair)) for n, pair in enumerate(pairs)]
        return cls([pairs], list(names), np.array(known, _Known))

    @classmethod
    def joined(cls, several: Sequence[Pairs]) -> Pairs:
        """The rows of all, one after the other."""
        parts: list[Sequence[Pair]] = []
        names: dict[str, int] = {}
        known, start = [np.empty(0, _Known)], 0
        for pairs in several:
            places = np.array([names.setdefault(name, len(names)) for name in pairs.names])
            known.append(pairs.known.copy())
            known[-1]["number"] += start
            known[-1]["subset"] = places[pairs.known["subset"]]
            parts += pairs.parts
            start += sum(map(len, pairs.parts))
        return cls(parts, list(names), np.concatenate(known))

    @property
    def num_rows(self) -> int:
        return len(self)

    def select(self, rows: np.ndarray) -> Pairs:
        """The rows at these positions, in this order."""
        return Pairs(self.parts, self.names, self.known[rows])

    def describing(self, subsets: Sequence[str] | None) -> Pairs:
        """Pairs of an image and its text, of the given subsets or of all: what generative stages
        can use.

        Raises:
            UserError: if none is left.
        """
        wanted = np.array([subsets is None or name in subsets for name in self.names], bool)
        kept = wanted[self.known["subset"]] & ~self.known["has_media"].all(1)
        if not kept.any():
            raise UserError(
                f"no pair has an image on one side and text on the other (subsets: {subsets})"
            )
        return self.select(kept)

    def first_of_each_subset(self, count: int | None) -> Pairs:
        """At most `count` pairs of each subset, in their order; None keeps all."""
        if count is None:
            return self
        subsets = pd.Series(self.known["subset"])
        return self.select((subsets.groupby(subsets).cumcount() < count).to_numpy())

    def subset_codes(self) -> tuple[list[str], np.ndarray]:
        """Names of the subsets in order of occurrence, and int64 [N], each row's place there."""
        codes, subsets = pd.factorize(self.known["subset"])
        return [self.names[subset] for subset in subsets], codes

    @cached_property
    def fingerprint(self) -> str:
        """Of the content of the files, of which rows are used in which order, and as what.

        Images that are files of their own are not looked at, and it does not matter where the
        folder lies.
        """
        digest = xxhash.xxh3_128(self.known["number"].tobytes())
        for part in self.parts:
            if isinstance(part, FileRows):
                digest.update(repr((part.subset, part.form.columns)).encode() + part.digest)
            else:
                digest.update(repr([(p.subset, *_keys(p)) for p in part]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        number = int(self.known["number"][index])
        part = bisect_right(self._starts, number) - 1
        return self.parts[part][number - self._starts[part]]


def read_files(
    files: Mapping[str, Sequence[Path]],
    form: RowFormat,
    *,
    subset: str,
    max_rows: int | None,
    left_out: RowErrors,
) -> Pairs:
    """The good rows of a subset.

    Args:
        files: what rows are called in messages, where they are numbered through -> their files.
        max_rows: of each of these, the first so many; None for all.
        left_out: see `read`.
    """
    parts = []
    for name, several in files.items():
        count = 0
        for file in several:
            rows = open_file(file, form)
            if max_rows is not None:
                rows = rows.select(range(min(len(rows), max_rows - count)))
            is_lines = file.suffix == ".jsonl"  # which editors count from 1
            label = f"{name} line" if is_lines else f"{name} row"
            parts.append(FileRows(rows, form, subset, label, first=count + is_lines))
            count += len(rows)
    return read(parts, source=", ".join(files), left_out=left_out)


def read(parts: Sequence[FileRows], *, source: str, left_out: RowErrors) -> Pairs:
    """Look at every row of a subset once, and keep which of them are pairs.

    Args:
        left_out: grows by an error for each row that is not used.

    Raises:
        UserError: for a bad row, if its format says so, or no usable row at all.
    """
    form, errors, identities = parts[0].form, RowErrors(), array("q")

    def known() -> Iterator[tuple[Any, ...]]:
        start = 0
        for part in parts:
            for number, row in enumerate(part.contents()):
                if isinstance(row, bytes) and not row.strip():  # a blank line of JSONL
                    continue
                pair = form.checked(row, row_id=part.row_id(number), subset=part.subset)
                if isinstance(pair, UserError):
                    errors.add(pair)
                    continue
                identities.append(hash(_keys(pair)[:2]))
                yield start + number, 0, *_known(pair)
            start += len(part)

    pairs = Pairs(parts, [parts[0].subset], np.fromiter(known(), _Known))
    _, first, same = np.unique(identities, return_index=True, return_inverse=True)
    is_new = first[same] == np.arange(len(pairs))
    for row in np.flatnonzero(~is_new).tolist():
        message = f"same query and positive as {pairs[int(first[same[row]])].row_id}"
        kind = "repeated_row"
        if form.repeated == "bad":
            message += "; remove one, or set on_bad_row=skip"
            kind = "duplicate_pair"
        error = UserError(message, kind=kind, row_id=pairs[row].row_id)
        if (form.repeated, form.on_bad_row) == ("bad", "fail"):
            raise error
        errors.add(error)
    errors.log(source=source)
    left_out.join(errors)
    if not pairs:
        count = errors.counts.total()
        raise UserError(f"{source}: no usable row ({count} skipped); training needs data")
    return pairs.select(is_new)


def group_key(pair: Pair) -> int:
    """What rows have in common that must not be split between training and validation: the image,
    or else the query.
    """
    media = pair.query.media or pair.positive.media
    return Item(IMAGE_SLOT, media[:1]).key if media else pair.query.key


def _known(pair: Pair) -> tuple[int, tuple[bool, bool]]:
    return group_key(pair), (bool(pair.query.media), bool(pair.positive.media))


def _keys(pair: Pair) -> tuple[int, ...]:
    return tuple(item.key for item in (pair.query, pair.positive, *pair.negatives))
