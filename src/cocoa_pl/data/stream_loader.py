"""A `PairStream` in, packed batches with the place where each ends out; workers share the steps.

Step t belongs to lane t modulo the number of workers. A lane is a set of readers, one for each
subset, with rows of their own; its state travels with its batches, so what a checkpoint holds is
the place behind the last batch that was trained on, however many were loaded ahead. A resumed run
gives lane t to whichever worker the loader asks first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from cocoa_pl.data.batch import Sample
from cocoa_pl.data.items import Pair
from cocoa_pl.data.sampler import Mixing, check_shareable, draw_subsets, mix
from cocoa_pl.data.stream import PairStream
from cocoa_pl.data.stream_reader import SubsetReader, reset_after_fork
from cocoa_pl.errors import UserError

LaneState = dict[str, Any]  # subset -> the state of its reader
Collate = Callable[[Sequence[list[Sample] | str]], Any]
MakeRow = Callable[[Pair, int], list[Sample] | str]


@dataclass(frozen=True)
class Streamed:
    """A collated batch, and where its lane goes on after it."""

    batch: Any
    lane: int
    state: LaneState

    def pin_memory(self) -> Streamed:
        return replace(self, batch=[batch.pin_memory() for batch in self.batch])


class StreamBatches(IterableDataset[Streamed]):
    """This rank's share of every step's global batch.

    Args:
        make_row: a pair and its seed to samples, or to the reason why it cannot be used.
        batch_size: rows of a step over all ranks.
        lanes: workers of this rank, at least one.
        states: of the lanes, where to go on; None each at the beginning.

    Raises:
        UserError: if the mixing does not fit the stream or ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        stream: PairStream,
        mixing: Mixing,
        make_row: MakeRow,
        collate: Collate,
        *,
        batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        on_bad_row: str,
        rank: int,
        world_size: int,
        lanes: int,
        states: Sequence[LaneState | None],
    ) -> None:
        check_shareable(batch_size, world_size)
        _ = stream.opened  # here, not in every worker: it asks the hub, and may fail
        self.stream = stream
        self.make_row = make_row
        self.collate = collate
        self.sub_batch_rows = mixing.sub_batch_rows(batch_size)
        sub_batches = batch_size // self.sub_batch_rows
        shares = mixing.shares(stream.names, stream.sizes)
        self.subsets = draw_subsets(shares, count=steps * sub_batches, seed=mix(seed))
        self.subsets = self.subsets.reshape(steps, sub_batches)
        self.positions = range(rank, batch_size, world_size)
        self.steps, self.start_step = steps, start_step
        self.seed = seed
        self.on_bad_row = on_bad_row
        self.rank, self.world_size = rank, world_size
        self.lanes = lanes
        self.states = list(states)

    def __iter__(self) -> Iterator[Streamed]:
        worker = get_worker_info()
        first = self.start_step
        if worker is not None:
            reset_after_fork()
            first += worker.id
        lane = first % self.lanes
        state: Mapping[str, Any] = self.states[lane] or {}
        readers = {name: self._reader(name, lane, state[name]) for name in state}
        for step in range(first, self.steps, self.lanes):
            subsets = self.subsets[step]
            rows = []
            for position in self.positions:
                name = self.stream.names[int(subsets[position // self.sub_batch_rows])]
                if name not in readers:
                    readers[name] = self._reader(name, lane, None)
                rows.append(self._row(readers[name], mix(self.seed, step, position)))
            state_after = {name: reader.state for name, reader in readers.items()}
            yield Streamed(self.collate(rows), lane, state_after)

    def _row(self, reader: SubsetReader, seed: int) -> list[Sample] | str:
        pair = reader.take()
        if not isinstance(pair, str):
            return self.make_row(pair, seed)
        if self.on_bad_row == "fail":
            raise UserError(pair)
        return pair

    def _reader(self, name: str, lane: int, state: Mapping[str, Any] | None) -> SubsetReader:
        return SubsetReader(
            self.stream,
            self.stream.names.index(name),
            reader=self.rank * self.lanes + lane,
            readers=self.world_size * self.lanes,
            seed=self.seed,
            state=state,
        )
