"""Pairs read on the fly, for corpora that fit no disk: shared by ranks and workers, and resumable.

Step t is of lane t modulo the number of workers. A lane reads its own share of each subset, and
shuffles it window by window. Where it goes on travels with its batches, so a checkpoint holds the
place behind the last batch that was trained on, however many were loaded ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

import datasets
import fsspec.asyn  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from cocoa_pl.data.items import Pair
from cocoa_pl.data.readers import as_row, group_key
from cocoa_pl.data.rows import RowFormat
from cocoa_pl.data.sampler import Mixing, check_shareable, draw_subsets, mix
from cocoa_pl.errors import UserError, first_line

Places = dict[str, dict[str, Any]]  # subset -> where a lane goes on: numbers, and `datasets`' state


@dataclass(frozen=True)
class PairStream:
    """Training pairs without a length, subset by subset.

    Args:
        subsets: name -> rows.
        sizes: [S], rows of each subset, what mixing goes by.
        window: rows of a subset that a lane holds in memory and shuffles among themselves.
        held_out: `group_key`s of validation rows; rows that share one are passed over.
        first: rows of each subset that are used, from the first on; None for all.
        is_describing: pass over rows with media on both sides.
    """

    subsets: Mapping[str, datasets.IterableDataset]
    sizes: np.ndarray
    form: RowFormat
    window: int
    held_out: frozenset[int]
    first: int | None = None
    is_describing: bool = False

    def describing(self, names: Sequence[str] | None) -> PairStream:
        """The given subsets' pairs of an image and its text."""
        wanted = [names is None or name in names for name in self.subsets]
        if not any(wanted):
            raise UserError(f"the stream holds none of the subsets {names}")
        subsets = dict(compress(self.subsets.items(), wanted))
        return replace(self, subsets=subsets, sizes=self.sizes[wanted], is_describing=True)

    def pairs(self, name: str, place: dict[str, Any], lane: int, lanes: int, seed: int) -> Any:
        """A lane's endless rows of a subset: each a pair, or what is wrong with it.

        `place` says where to begin, and is kept behind the last row.
        """
        rows, by = self.subsets[name], "auto"
        if self.first is not None:  # they are not the first of each lane's share
            rows, by = rows.take(self.first), "examples"
        share = split_dataset_by_node(rows, rank=lane, world_size=lanes, strategy=by)
        while True:
            is_any = bool(place["window"] or place["taken"])
            share.set_epoch(mix(seed, place["epoch"]) >> 33)  # the order of row groups
            share.load_state_dict(place["rows"])
            try:
                for table in share.iter(batch_size=self.window):
                    for row in self._window(table, name, place, lane, lanes, seed):
                        is_any |= isinstance(row, Pair)
                        yield row
                    place.update(window=place["window"] + 1, taken=0, rows=share.state_dict())
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"{name}: the stream broke off ({first_line(error):.200}); "
                    "resume=RUN goes on behind the last checkpoint"
                ) from error
            if not is_any:
                raise UserError(
                    f"{name}: reader {lane + 1} of {lanes} (ranks x workers) has no row to train "
                    "on; use fewer workers, lower data.validation_rows or leave the subset out"
                )
            place.update(epoch=place["epoch"] + 1, window=0, taken=0, rows=None)

    def _window(
        self, table: pa.Table, name: str, place: dict[str, Any], lane: int, lanes: int, seed: int
    ) -> Iterator[Pair | str]:
        """What is left of a window, in its order."""
        where = f"(streamed, reader {lane + 1}/{lanes}, window {place['window']})"
        rng = np.random.default_rng([seed, lane, place["epoch"], place["window"]])
        for at in rng.permutation(len(table))[place["taken"] :].tolist():
            place["taken"] += 1
            try:
                row = as_row(table.slice(at, 1).to_pylist()[0])
                pair = self.form.pair(row, row_id=f"{name} {where} row {at}", subset=name)
            except UserError as error:
                yield str(error)
                continue
            both = self.is_describing and pair.query.media and pair.positive.media
            if not both and group_key(pair) not in self.held_out:
                yield pair


class Streamed(NamedTuple):
    """A batch, and where its lane goes on behind it."""

    batch: Any
    lane: int
    places: Places


@dataclass
class StreamBatches(IterableDataset[Streamed]):
    """This rank's share of every step's batch.

    Args:
        make_row: makes of a pair and a seed what `collate` takes, as it takes what is wrong with
            a row.
        batch_size: rows of a step over all ranks.
        places: of the lanes of this rank, one for each worker and at least one.
    """

    stream: PairStream
    mixing: Mixing
    make_row: Callable[[Pair, int], Any]
    collate: Callable[[Sequence[Any]], Any]
    batch_size: int
    steps: int
    start_step: int
    seed: int
    on_bad_row: str
    rank: int
    world_size: int
    places: Sequence[Places]

    def __post_init__(self) -> None:
        check_shareable(self.batch_size, self.world_size)
        each = self.mixing.sub_batch_rows(self.batch_size)
        shares = self.mixing.shares(list(self.stream.subsets), self.stream.sizes)
        count = self.steps * self.batch_size // each
        drawn = draw_subsets(shares, count=count, seed=mix(self.seed))
        self.drawn = drawn.repeat(each).reshape(-1, self.batch_size)  # the subset of every row

    def __iter__(self) -> Iterator[Streamed]:
        fsspec.asyn.reset_lock()  # it may have been held when this process was forked
        worker, lanes = get_worker_info(), len(self.places)
        first = self.start_step + (worker.id if worker else 0)
        lane = first % lanes
        start = {"epoch": 0, "window": 0, "taken": 0, "rows": None}
        places = {n: start | self.places[lane].get(n, {}) for n in self.stream.subsets}
        share = (self.rank * lanes + lane, self.world_size * lanes)
        readers = [
            self.stream.pairs(name, place, *share, mix(self.seed, code))
            for code, (name, place) in enumerate(places.items())
        ]
        for step in range(first, self.steps, lanes):
            rows = []
            for position in range(self.rank, self.batch_size, self.world_size):
                row = next(readers[self.drawn[step, position]])
                if isinstance(row, Pair):
                    row = self.make_row(row, mix(self.seed, step, position))
                elif self.on_bad_row == "fail":
                    raise UserError(row)
                rows.append(row)
            behind = {name: dict(place) for name, place in places.items()}
            yield Streamed(self.collate(rows), lane, behind)
