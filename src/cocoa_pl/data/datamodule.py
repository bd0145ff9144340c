"""The LightningDataModule of a stage: pairs become batches in the data workers."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple
from zlib import crc32

import fsspec.asyn  # type: ignore[import-untyped]
import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from cocoa_pl.data.batch import Collator, Sample
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.items import Pair
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import Index, Mixing, StepSampler, mix
from cocoa_pl.data.stream import PairStream
from cocoa_pl.distributed.collectives import all_objects, rank, world_size
from cocoa_pl.distributed.processes import end_with_parent
from cocoa_pl.errors import UserError

_VALIDATION_EPOCH = -1  # its masks are drawn once and for all
LARGE = 1 << 20  # bytes; below, one copy through a pipe costs less than a file

Places = dict[str, dict[str, Any]]  # subset -> where a reader of a stream goes on
MakeRow = Callable[[Pair, int], list[Sample] | UserError]


def samples_of(
    pair: Pair,
    seed: int,
    *,
    make_samples: MakeSamples,
    processor: Processor,
    masking: Masking | None,
    on_bad_row: str,
) -> list[Sample] | UserError:
    """What a stage makes of a pair: tokens and patches, masked; a pure function of pair and seed.

    With `on_bad_row="skip"` a pair that cannot be read yields the reason instead, never an invented
    image.
    """
    rng = np.random.default_rng(seed)
    of_row: dict[str, Any] = {"row_id": pair.row_id, "pool": crc32(pair.subset.encode())}
    try:
        samples = [
            processor(context, target, key=context.key, role=role, **of_row)
            for role, (context, target) in enumerate(make_samples(pair, rng))
        ]
    except UserError as error:
        if on_bad_row == "fail":
            raise
        return error
    return samples if masking is None else [masking(sample, rng) for sample in samples]


@dataclass
class RowSamples(Dataset[list[Sample] | UserError]):
    """Rows of a stage, read in the workers: a pure function of (seed, epoch, index)."""

    pairs: Sequence[Pair]
    make_row: MakeRow
    seed: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Index) -> list[Sample] | UserError:
        epoch, row = index
        return self.make_row(self.pairs[row], mix(self.seed, epoch, row))


class Streamed(NamedTuple):
    """A batch, and where its lane goes on behind it."""

    batch: Any
    lane: int
    places: Places


@dataclass
class StreamBatches(IterableDataset[Streamed]):
    """This rank's share of every step's batch of a stream.

    Step t is of lane t modulo the number of workers, and a lane reads a share of its own. Where it
    goes on travels with its batches, so a checkpoint holds the place behind the last batch that was
    trained on, however many were loaded ahead.

    Args:
        drawn: int64 [steps, rows of a step over all ranks], the subset of every row.
        make_row: makes of a pair and a seed what `collate` takes, as it takes what is wrong with
            a row.
        places: of the lanes of this rank, one for each worker and at least one.
    """

    stream: PairStream
    drawn: np.ndarray
    make_row: Callable[[Pair, int], Any]
    collate: Callable[[Sequence[Any]], Any]
    start_step: int
    seed: int
    rank: int
    world_size: int
    places: Sequence[Places]

    def __iter__(self) -> Iterator[Streamed]:
        fsspec.asyn.reset_lock()  # it may have been held when this process was forked
        worker, lanes = get_worker_info(), len(self.places)
        first = self.start_step + (worker.id if worker else 0)
        lane = first % lanes
        places = {name: dict(self.places[lane].get(name, {})) for name in self.stream.subsets}
        share = (self.rank * lanes + lane, self.world_size * lanes)
        readers = [
            self.stream.pairs(name, place, *share, mix(self.seed, code))
            for code, (name, place) in enumerate(places.items())
        ]
        for step in range(first, len(self.drawn), lanes):
            rows = []
            for position in range(self.rank, self.drawn.shape[1], self.world_size):
                row = next(readers[self.drawn[step, position]])
                seed = mix(self.seed, step, position)
                rows.append(self.make_row(row, seed) if isinstance(row, Pair) else row)
            behind = {name: dict(place) for name, place in places.items()}
            yield Streamed(self.collate(rows), lane, behind)


def start_worker(worker: int) -> None:
    """Set up a data worker: it ends with the process that started it, and sends small tensors
    through its pipe; only large ones (pixels) go in shared memory of their own.

    A step holds hundreds of small tensors (where segments begin, who attends to whom); torch opens
    a file for each that it shares, and a process may have only so many files open.
    """
    end_with_parent()
    ForkingPickler.register(Tensor, _reduce)


def _reduce(tensor: Tensor) -> Any:
    return (torch.from_numpy, (tensor.numpy(),)) if tensor.nbytes < LARGE else reduce_tensor(tensor)


def validation_batches(
    num_rows: int, *, global_batch_size: int, rank: int, world_size: int
) -> list[list[Index]]:
    """This rank's share of global batches of about equal size; every rank has rows in every one.

    Raises:
        UserError: if there are fewer rows than ranks.
    """
    if num_rows < world_size:
        raise UserError(
            f"the validation data has {num_rows} rows for {world_size} ranks; "
            "give at least one row for each, or set validation_fraction to 0"
        )
    count = min(math.ceil(num_rows / global_batch_size), num_rows // world_size)
    bounds = [math.ceil(number * num_rows / count) for number in range(count + 1)]
    return [
        [(_VALIDATION_EPOCH, row) for row in range(start + rank, stop, world_size)]
        for start, stop in pairwise(bounds)
    ]


def check_mixing(train: Pairs | PairStream, mixing: Mixing, *, batch_size: int) -> None:
    """Refuse a mixing that does not fit the data, before anything is trained.

    Raises:
        UserError: as `train_dataloader` would.
    """
    if isinstance(train, PairStream):
        mixing.subsets(train.sizes, batch_size=batch_size, steps=0, seed=0)
    else:
        StepSampler(
            *(train, mixing, batch_size), seed=0, steps=0, start_step=0, rank=0, world_size=1
        )


@dataclass(kw_only=True, eq=False, repr=False)
class StageData(L.LightningDataModule):
    """Training and validation batches of one stage.

    Args:
        train, validation: pairs; training pairs may be a stream; no validation pairs mean none.
        masking: hides parts of samples; None for a stage that hides nothing.
        collator, validation_collator: make batches of rows.
        mixing: how batches are composed of subsets.
        batch_size: rows of a step over all ranks.
        validation_batch_size: rows at a time on a rank.
        start_step: first step to draw, for a resumed run.
        pinned: hand batches over in page-locked memory, from where a GPU fetches them by itself.
    """

    train: Pairs | PairStream
    validation: Sequence[Pair]
    make_samples: MakeSamples
    processor: Processor
    masking: Masking | None
    collator: Collator
    validation_collator: Collator
    mixing: Mixing
    batch_size: int
    validation_batch_size: int
    steps: int
    start_step: int
    seed: int
    num_workers: int
    on_bad_row: str
    pinned: bool

    def __post_init__(self) -> None:
        super().__init__()
        self.make_row = partial(
            samples_of,
            make_samples=self.make_samples,
            processor=self.processor,
            masking=self.masking,
            on_bad_row=self.on_bad_row,
        )
        self._lanes: list[Places] = [{}] * max(1, self.num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        if self.batch_size % world_size():
            raise UserError(
                f"a batch of {self.batch_size} cannot be shared by {world_size()} ranks"
            )
        share = {"rank": rank(), "world_size": world_size()}
        share |= {"start_step": self.start_step, "seed": self.seed}
        if isinstance(self.train, PairStream):
            drawn = self.mixing.subsets(
                self.train.sizes, batch_size=self.batch_size, steps=self.steps, seed=self.seed
            )
            batches = StreamBatches(
                self.train, drawn, self.make_row, self.collator, places=self._lanes, **share
            )
            return self._loader(batches, batch_size=None)
        sampler = StepSampler(
            self.train, self.mixing, batch_size=self.batch_size, steps=self.steps, **share
        )
        rows = RowSamples(self.train, self.make_row, self.seed)
        return self._loader(rows, batch_sampler=sampler, collate_fn=self.collator)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Remember where a stream stands: not what is loaded counts, but what is trained on."""
        if isinstance(batch, Streamed):
            self._lanes[batch.lane] = batch.places
            return batch.batch
        return batch

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Nothing: a step moves its batches one by one, when it is their turn."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the streams of all ranks stand; empty for data that need no state."""
        is_stream = isinstance(self.train, PairStream)
        return {"lanes_of_ranks": all_objects(self._lanes)} if is_stream else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this rank's stream stood.

        Raises:
            UserError: if the number of ranks or workers is another one, whose shares differ.
        """
        lanes = state_dict["lanes_of_ranks"]
        before, now = (len(lanes), len(lanes[0])), (world_size(), len(self._lanes))
        if before != now:
            raise UserError(
                f"the stream was read by {before[0]} ranks x {before[1]} workers and cannot go on "
                f"with {now[0]} x {now[1]}; resume on {before[0]} ranks with "
                f"num_workers={before[1]}"
            )
        self._lanes = list(lanes[rank()])

    def val_dataloader(self) -> DataLoader[Any] | list[None]:
        if not len(self.validation):
            return []
        rows = RowSamples(self.validation, self.make_row, self.seed)
        batches = validation_batches(
            len(rows),
            global_batch_size=self.validation_batch_size,
            rank=rank(),
            world_size=world_size(),
        )
        return self._loader(rows, batch_sampler=batches, collate_fn=self.validation_collator)

    def _loader(self, rows: Dataset[Any], **how: Any) -> DataLoader[Any]:
        return DataLoader(
            rows,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=start_worker,
            pin_memory=self.pinned,
            **how,
        )
