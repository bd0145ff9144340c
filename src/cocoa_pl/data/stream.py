"""Pairs read on the fly, for corpora that fit no disk: shared by readers, shuffled, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.distributed import split_dataset_by_node

from cocoa_pl.data.items import Pair
from cocoa_pl.data.pairs import group_key
from cocoa_pl.data.readers import as_row
from cocoa_pl.data.rows import RowFormat
from cocoa_pl.data.sampler import mix
from cocoa_pl.errors import UserError, first_line

_NUMBER = "number of a row"  # a column beside those of the rows


@dataclass(frozen=True)
class PairStream:
    """Training pairs without a length, subset by subset.

    Args:
        sizes: rows of each subset, what mixing goes by.
        window: rows of a subset that a reader holds in memory and shuffles among themselves.
        held_out: `group_key`s of validation rows; rows that share one are passed over.
        is_describing: pass over rows with media on both sides.
        dealt_by: `strategy` of `split_dataset_by_node`.
    """

    subsets: Mapping[str, datasets.IterableDataset]
    sizes: Mapping[str, int]
    form: RowFormat
    window: int
    held_out: frozenset[int]
    is_describing: bool = False
    dealt_by: str = "auto"
    num_rows: ClassVar[None] = None
    fingerprint: ClassVar[None] = None

    def describing(self, names: Sequence[str] | None) -> PairStream:
        """The given subsets' pairs of an image and its text; None for all subsets."""
        subsets = {n: rows for n, rows in self.subsets.items() if names is None or n in names}
        if not subsets:
            raise UserError(f"the stream holds none of the subsets {names}")
        sizes = {name: self.sizes[name] for name in subsets}
        return replace(self, subsets=subsets, sizes=sizes, is_describing=True)

    def first_of_each_subset(self, count: int | None) -> PairStream:
        """At most `count` rows of each subset; None keeps all."""
        if count is None:
            return self
        subsets = {name: rows.take(count) for name, rows in self.subsets.items()}
        return replace(self, subsets=subsets, dealt_by="examples")  # not the first of each share

    def pairs(
        self, name: str, place: dict[str, Any], reader: int, readers: int, seed: int
    ) -> Iterator[Pair | UserError]:
        """A reader's share of a subset, without end: each row a pair, or what is wrong with it.

        Args:
            place: where to begin, {} for the beginning; kept behind the last row: the epoch, and
                `datasets`' own state in it.
        """
        while True:
            epoch, state = place.setdefault("epoch", 0), place.get("rows")
            where = f"{name} (streamed, reader {reader + 1}/{readers}, epoch {epoch})"
            order = mix(seed, epoch) >> 33
            rows = self.subsets[name].map(
                partial(_permuted, seed=order),
                with_indices=True,
                batched=True,
                batch_size=self.window,
            )
            share = split_dataset_by_node(rows, reader, readers, self.dealt_by)
            share.set_epoch(order)  # by which row groups are dealt out
            share.load_state_dict(state)
            is_any = state is not None
            try:
                for one in share.iter(batch_size=1):  # its plain iterator would share with workers
                    place["rows"] = share.state_dict()
                    row = {column: values[0] for column, values in one.items()}
                    row_id = f"{where} row {row.pop(_NUMBER)}"
                    pair = self.form.checked(as_row(row), row_id=row_id, subset=name)
                    if isinstance(pair, Pair):
                        both = self.is_describing and pair.query.media and pair.positive.media
                        if both or group_key(pair) in self.held_out:
                            continue
                        is_any = True
                    yield pair
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"{where}: the stream broke off ({first_line(error):.200}); "
                    "resume=RUN goes on behind the last checkpoint"
                ) from error
            if not is_any:
                raise UserError(
                    f"{where}: no row to train on; use fewer ranks or workers, lower "
                    "data.validation_rows, or leave the subset out"
                )
            place.update(epoch=epoch + 1, rows=None)


def _permuted(
    columns: dict[str, list[Any]], numbers: list[int], *, seed: int
) -> dict[str, list[Any]]:
    """A window of rows with their numbers, in a random order.

    `datasets`' own shuffling loses what is in its buffer when it is resumed; this way it knows the
    place to the row.
    """
    order = np.random.default_rng([seed, numbers[0]]).permutation(len(numbers)).tolist()
    columns = columns | {_NUMBER: numbers}
    return {name: [values[at] for at in order] for name, values in columns.items()}
