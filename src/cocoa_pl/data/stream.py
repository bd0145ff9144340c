"""A hub data set or a parquet folder in, pairs read on the fly out: for corpora that fit no disk.

Rows have MMEB's columns (`mmeb_rows`); images are paths below an image root, or embedded. What is
opened here is read by `stream_reader`, in the loader's workers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from cocoa_pl.config.bounds import Count, Whole
from cocoa_pl.data.holdout import as_subsets, group_key
from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.data.mmeb_rows import NEGATIVE_COLUMNS, TRAIN_COLUMNS, parse_row
from cocoa_pl.data.rows import OnBadRow, check_on_bad_row, distinct_texts
from cocoa_pl.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamedFiles:
    """Where streamed rows come from, and how they are read.

    Args:
        path: a local folder or the id of a hub data set.
        pattern: files of a subset, with `{subset}` and `{split}`.
        image_root: folder that image paths are relative to; the images are not streamed.
        window: rows of a subset that a reader holds in memory and shuffles among themselves.
        drop_orphan_slots: as in `mmeb_rows.parse_row`.
    """

    path: str
    pattern: str
    split: str
    image_root: Path
    window: int
    drop_orphan_slots: bool

    def open(self, subset: str) -> datasets.IterableDataset:
        """The subset's rows as Arrow, needed columns only, as many shards as there are row groups.

        Raises:
            UserError: if they cannot be reached, or lack a column.
        """
        pattern = self.pattern.format(subset=subset, split=self.split)
        try:
            rows = datasets.load_dataset(
                self.path, data_files={"train": pattern}, split="train", streaming=True
            )
            rows = rows.reshard()
        except (OSError, ValueError) as error:  # includes what cannot be found or reached
            raise UserError(
                f"{subset}: cannot stream {pattern} of {self.path} "
                f"({str(error).splitlines()[0]:.200}); check the name, the network, or fetch it "
                f"with: hf download {self.path} --repo-type dataset --local-dir FOLDER"
            ) from error
        present = rows.column_names or []
        if missing := [name for name in TRAIN_COLUMNS if name not in present]:
            raise UserError(
                f"{subset}: {pattern} of {self.path} has no column {', '.join(missing)} "
                f"(it has {', '.join(present)})"
            )
        wanted = [n for n in (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS) if n in present]
        return rows.select_columns(wanted).with_format("arrow")

    def parse(self, row: dict[str, Any], *, row_id: str, subset: str) -> Pair:
        """One row as a pair."""
        return parse_row(
            row,
            row_id=row_id,
            subset=subset,
            image_root=self.image_root,
            drop_orphan_slots=self.drop_orphan_slots,
        )


@dataclass(frozen=True)
class PairStream:
    """Training pairs without a length, subset by subset.

    Args:
        rows: of each subset, as far as they are known: what mixing takes for its size.
        held_out: `group_key`s of validation rows; training rows that share one are passed over.
        first: rows of each subset that are used, from the first on; None for all.
        only_describing: pass over rows with an image on both sides.
    """

    files: StreamedFiles
    names: tuple[str, ...]
    rows: Mapping[str, int]
    held_out: frozenset[int]
    first: int | None
    only_describing: bool

    def describing(self, subsets: Sequence[str] | None) -> PairStream:
        """The given subsets' pairs of an image and its text.

        Raises:
            UserError: if there is none of these subsets.
        """
        names = tuple(name for name in self.names if subsets is None or name in subsets)
        if not names:
            raise UserError(f"the stream holds none of the subsets {subsets}")
        return replace(self, names=names, only_describing=True)

    def first_of_each_subset(self, count: int | None) -> PairStream:
        """At most `count` rows of each subset in each epoch; None keeps all."""
        return replace(self, first=count)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [S], rows of each subset; all 1 where none is known."""
        return np.array([self.rows.get(name, 1) for name in self.names], dtype=np.int64)

    @cached_property
    def opened(self) -> tuple[datasets.IterableDataset, ...]:
        """The subsets' files; opened once, in the process that starts the workers."""
        opened = [self.files.open(name) for name in self.names]
        if self.first is None:
            return tuple(opened)
        return tuple(rows.take(self.first) for rows in opened)


class StreamData:
    """MMEB's columns, streamed; the first rows of each subset are held out for validation.

    Args:
        path, files, split, image_root, window, drop_orphan_slots: see `StreamedFiles`.
        subsets: names, as in the file pattern.
        rows: subset -> its number of rows, for mixing by size; a stream cannot count them.
        caption_subsets: those whose pairs are a picture and its whole caption.
        validation_rows: first rows of each subset that are held out, and with them every row of the
            same image; 0 for none.
    """

    def __init__(
        self,
        *,
        path: str,
        files: str,
        split: str,
        subsets: Sequence[str],
        image_root: str,
        rows: Mapping[str, Count] | None,
        window: Count,
        drop_orphan_slots: bool,
        caption_subsets: Sequence[str],
        validation_rows: Whole,
        on_bad_row: OnBadRow,
    ) -> None:
        check_on_bad_row(on_bad_row)
        for told, names in (("caption_subsets", caption_subsets), ("rows", rows or {})):
            if unknown := [name for name in names if name not in subsets]:
                raise UserError(f"data.{told} names {unknown[0]}, not among data.subsets")
        if not subsets:
            raise UserError("data.subsets is empty; name at least one")
        if rows and len(rows) < len(subsets):
            raise UserError("data.rows must name every subset, or be null")
        self.files = StreamedFiles(path, files, split, Path(image_root), window, drop_orphan_slots)
        self.names = tuple(subsets)
        self.rows = dict(rows or {})
        self.caption_subsets = tuple(caption_subsets)
        self.validation_rows = validation_rows
        self.on_bad_row = on_bad_row

    def train_pairs(self) -> PairStream:
        """All rows that are not held out, as a stream."""
        held_out = frozenset(group_key(pair) for pair in self.validation_pairs())
        return PairStream(self.files, self.names, self.rows, held_out, None, False)

    def validation_pairs(self) -> list[Pair]:
        """The held-out rows."""
        return self._held_out

    def validation_subsets(self) -> list[EvalSubset]:
        """The held-out rows of each subset as a retrieval task among their own positives."""
        return as_subsets(self.validation_pairs(), max_rows=self.validation_rows)

    def training_texts(self) -> list[str]:
        """The held-out rows' texts: all that is at hand of a stream."""
        return distinct_texts(self.validation_pairs())

    @cached_property
    def _held_out(self) -> list[Pair]:
        if not self.validation_rows:
            return []
        pairs = []
        for name in self.names:
            rows = self.files.open(name).take(self.validation_rows)
            for table in rows.iter(batch_size=self.validation_rows):
                for number, row in enumerate(table.to_pylist()):
                    try:
                        row_id = f"{name} row {number}"
                        pairs.append(self.files.parse(row, row_id=row_id, subset=name))
                    except UserError as error:
                        if self.on_bad_row == "fail":
                            raise
                        log.warning("left out of validation: %s", error)
        return pairs
