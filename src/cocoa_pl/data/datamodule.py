"""Pairs in, packed batches out: what a stage trains and validates on."""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from cocoa_pl.batch import Encoded, Rows, pack
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.items import Pair
from cocoa_pl.data.sampler import Index, Mixing, StepSampler, make_order
from cocoa_pl.data.stream import PairStream
from cocoa_pl.data.stream_loader import LaneState, StreamBatches, Streamed
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.data.transport import Parcel
from cocoa_pl.distributed.collectives import rank, world_size
from cocoa_pl.distributed.processes import end_with_parent
from cocoa_pl.errors import UserError
from cocoa_pl.randomness import mix

log = logging.getLogger(__name__)

Prepare = Callable[[Rows], Any]  # makes of rows what a stage's step takes

_VALIDATION_EPOCH = -1  # its corruption is drawn once and for all


class Encoder:
    """What a stage makes of a pair, opened and tokenized; a pure function of the pair and a seed.

    With `on_bad_row="skip"` a pair that cannot be read yields the reason instead, never an invented
    image.
    """

    def __init__(self, make_samples: MakeSamples, processor: Processor, *, on_bad_row: str) -> None:
        self.make_samples = make_samples
        self.processor = processor
        self.on_bad_row = on_bad_row

    def __call__(self, pair: Pair, seed: int) -> list[Encoded] | str:
        try:
            return [
                self.processor.encode(
                    sample.context,
                    sample.target,
                    key=sample.context.key,
                    seed=mix(seed, role),
                    row_id=pair.row_id,
                )
                for role, sample in enumerate(self.make_samples(pair, seed))
            ]
        except UserError as error:
            if self.on_bad_row == "fail":
                raise
            return str(error)


class EncodedRows(Dataset[list[Encoded] | str]):
    """Rows of a stage, encoded in the workers: a pure function of (seed, epoch, index)."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        make_samples: MakeSamples,
        processor: Processor,
        *,
        seed: int,
        on_bad_row: str,
    ) -> None:
        self.pairs = pairs
        self.encode = Encoder(make_samples, processor, on_bad_row=on_bad_row)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Index) -> list[Encoded] | str:
        epoch, row = index
        return self.encode(self.pairs[row], mix(self.seed, epoch, row))


def collate(rows: Sequence[list[Encoded] | str]) -> Rows:
    """Pack samples role by role: all first samples of the rows, then all second ones, ...

    Raises:
        UserError: if every row of the batch is bad.
    """
    good = [row for row in rows if not isinstance(row, str)]
    skipped = tuple(row for row in rows if isinstance(row, str))
    if not good:
        raise UserError(f"no row of this batch can be read, first: {skipped[0]}")
    roles = range(max(len(row) for row in good))
    samples = [row[role] for role in roles for row in good if len(row) > role]
    return Rows(pack(samples), len(good), skipped)


class Batches:
    """A collate function: encoded rows to what a step takes, worked out where rows are encoded."""

    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare

    def __call__(self, rows: Sequence[list[Encoded] | str]) -> Parcel:
        return Parcel(self.prepare(collate(rows)))


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


def check_mixing(train: Sequence[Pair] | PairStream, mixing: Mixing, *, batch_size: int) -> None:
    """Refuse a mixing that does not fit the data, before anything is trained.

    Raises:
        UserError: as `make_order` and `StreamBatches` would.
    """
    if isinstance(train, PairStream):
        mixing.shares(train.names, train.sizes)
        mixing.sub_batch_rows(batch_size)
    else:
        make_order(train, mixing, batch_size=batch_size, seed=0)


class StageData(L.LightningDataModule):
    """Training and validation batches of one stage.

    Args:
        train, validation: pairs; training pairs may be a stream; no validation pairs mean none.
        mixing: how batches are composed of subsets.
        batch_size: rows of a step over all ranks.
        validation_batch_size: rows at a time on a rank.
        prepare, prepare_validation: make of rows what the stage's steps take, in the workers.
        start_step: first step to draw, for a resumed run.
        pinned: hand batches over in page-locked memory, from where a GPU fetches them by itself.
    """

    def __init__(
        self,
        train: Sequence[Pair] | PairStream,
        validation: Sequence[Pair],
        *,
        make_samples: MakeSamples,
        processor: Processor,
        prepare: Prepare,
        prepare_validation: Prepare,
        mixing: Mixing,
        batch_size: int,
        validation_batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        num_workers: int,
        on_bad_row: str,
        pinned: bool,
    ) -> None:
        super().__init__()
        self.train = train
        self.prepare, self.prepare_validation = prepare, prepare_validation
        self.pinned = pinned
        self.validation_rows = EncodedRows(
            validation, make_samples, processor, seed=seed, on_bad_row=on_bad_row
        )
        self.encode = Encoder(make_samples, processor, on_bad_row=on_bad_row)
        self.mixing = mixing
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.steps = steps
        self.start_step = start_step
        self.seed = seed
        self.num_workers = num_workers
        self._lanes: list[LaneState | None] = [None] * max(1, num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        if isinstance(self.train, PairStream):
            return self._stream_loader(self.train)
        rows = EncodedRows(
            self.train,
            self.encode.make_samples,
            self.encode.processor,
            seed=self.seed,
            on_bad_row=self.encode.on_bad_row,
        )
        sampler = StepSampler(
            make_order(self.train, self.mixing, batch_size=self.batch_size, seed=self.seed),
            steps=self.steps,
            start_step=self.start_step,
            rank=rank(),
            world_size=world_size(),
        )
        return self._loader(rows, sampler, self.prepare)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Unpack; and remember where a stream stands: not what is loaded counts, but what is
        trained on.
        """
        if isinstance(batch, Streamed):
            self._lanes[batch.lane] = batch.state
            batch = batch.batch
        return batch.content if isinstance(batch, Parcel) else batch

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Nothing: a step moves its chunks one by one, when it is their turn."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the streams of all ranks stand; empty for data that need no state."""
        if not isinstance(self.train, PairStream):
            return {}
        lanes: list[Any] = [self._lanes]
        if world_size() > 1:
            lanes = [None] * world_size()
            dist.all_gather_object(lanes, self._lanes)
        return {"lanes_of_ranks": lanes}

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

    def _stream_loader(self, stream: PairStream) -> DataLoader[Any]:
        batches = StreamBatches(
            stream,
            self.mixing,
            self.encode,
            Batches(self.prepare),
            batch_size=self.batch_size,
            steps=self.steps,
            start_step=self.start_step,
            seed=self.seed,
            on_bad_row=self.encode.on_bad_row,
            rank=rank(),
            world_size=world_size(),
            lanes=len(self._lanes),
            states=self._lanes,
        )
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pinned,
            worker_init_fn=end_with_parent,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[None]:
        if not len(self.validation_rows):
            return []
        batches = validation_batches(
            len(self.validation_rows),
            global_batch_size=self.validation_batch_size,
            rank=rank(),
            world_size=world_size(),
        )
        return self._loader(self.validation_rows, batches, self.prepare_validation)

    def _loader(
        self, rows: EncodedRows, batches: StepSampler | list[list[Index]], prepare: Prepare
    ) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=Batches(prepare),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pinned,
            worker_init_fn=end_with_parent,
        )
