"""A stream and a reader's number in, that reader's endless rows of one subset out.

Every reader takes its own share of the subset's files (whole row groups where they can be dealt out
evenly, else every n-th row) and shuffles it window by window, so that its place is a few numbers:
the file position before the window, and how many rows of it are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import fsspec.asyn  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node

from cocoa_pl.data.holdout import group_key
from cocoa_pl.data.items import Pair
from cocoa_pl.data.sampler import mix
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError

_WINDOW_STREAM, _FILE_STREAM = 21, 22


class SubsetReader:
    """One reader's endless rows of one subset.

    Args:
        subset: its place among the stream's names.
        reader, readers: which share of the rows; all readers together see each row once an epoch.
        state: where to go on, as `state` once told; None for the beginning.
    """

    def __init__(
        self,
        stream: PairStream,
        subset: int,
        *,
        reader: int,
        readers: int,
        seed: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.stream = stream
        self.name = stream.names[subset]
        self.reader, self.readers = reader, readers
        self.seed = mix(seed, subset)
        place = state or {"epoch": 0, "window": 0, "taken": 0, "files": None}
        self._epoch: int = place["epoch"]
        self._window: int = place["window"]  # number of the window at hand, or of the next one
        self._before: Any = place["files"]  # position in the files before it
        self._rows = split_dataset_by_node(
            stream.opened[subset],
            rank=reader,
            world_size=readers,
            # The first rows of a subset are not the first ones of each reader's share.
            strategy="auto" if stream.first is None else "examples",
        )
        self._table: pa.Table | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._open()
        if place["taken"]:
            self._load()
        self._taken: int = place["taken"]

    @property
    def state(self) -> dict[str, Any]:
        """Plain numbers and names from which an equal reader goes on with the next row."""
        return {
            "epoch": self._epoch,
            "window": self._window,
            "taken": self._taken,
            "files": self._before,
        }

    def take(self) -> Pair | str:
        """The next training row, or what is wrong with it.

        Raises:
            UserError: if this reader has no rows, or the files cannot be read any more.
        """
        epoch = self._epoch
        while self._epoch <= epoch + 1:
            row_id, row = self._next()
            try:
                pair = self.stream.files.parse(row, row_id=row_id, subset=self.name)
            except UserError as error:
                return str(error)
            both_images = bool(pair.query.media and pair.positive.media)
            if not (self.stream.only_describing and both_images) and (
                not self.stream.held_out or group_key(pair) not in self.stream.held_out
            ):
                return pair
        raise UserError(
            f"{self.name}: reader {self.reader + 1} of {self.readers} found no row for training in "
            "a whole epoch; lower data.validation_rows or leave the subset out"
        )

    def _next(self) -> tuple[str, dict[str, Any]]:
        if self._table is None or self._taken == len(self._order):
            self._advance()
        assert self._table is not None
        place = int(self._order[self._taken])
        self._taken += 1
        row_id = (
            f"{self.name} (streamed, reader {self.reader + 1}/{self.readers}, "
            f"window {self._window}) row {place}"
        )
        return row_id, self._table.slice(place, 1).to_pylist()[0]

    def _advance(self) -> None:
        """The next window, of the next epoch if need be."""
        if self._table is not None:
            self._window += 1
            self._before = self._rows.state_dict()
        if not self._load():
            if self._window == 0:
                raise UserError(
                    f"{self.name}: reader {self.reader + 1} of {self.readers} (ranks x workers) "
                    "gets no rows; use fewer workers, or leave the subset out"
                )
            self._epoch, self._window, self._before = self._epoch + 1, 0, None
            self._open()
            self._load()
        self._taken = 0

    def _open(self) -> None:
        """Start reading at `_before`."""
        self._rows.set_epoch(mix(self.seed, _FILE_STREAM, self._epoch) >> 33)
        self._rows.load_state_dict(self._before)
        self._windows: Iterator[pa.Table] = self._rows.iter(batch_size=self.stream.files.window)

    def _load(self) -> bool:
        try:
            self._table = next(self._windows, None)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.name}: the stream broke off ({str(error).splitlines()[0]:.200}); "
                "resume=RUN goes on behind the last checkpoint"
            ) from error
        if self._table is None:
            return False
        generator = torch.Generator().manual_seed(
            mix(self.seed, _WINDOW_STREAM, self.reader, self._epoch, self._window)
        )
        self._order = torch.randperm(len(self._table), generator=generator).numpy()
        return True


def reset_after_fork() -> None:
    """To be called in a worker: a lock of the file system library that was forked may be held."""
    fsspec.asyn.reset_lock()
