"""The LightningDataModule of a stage: pairs become batches in the data workers."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from cocoa_pl.data.batch import Collator, Sample
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.items import Pair
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import Index, Mixing, StepSampler, make_order, mix
from cocoa_pl.data.stream import PairStream, Places, StreamBatches, Streamed
from cocoa_pl.distributed.collectives import rank, world_size
from cocoa_pl.distributed.processes import end_with_parent
from cocoa_pl.errors import UserError

_VALIDATION_EPOCH = -1  # its masks are drawn once and for all
LARGE = 1 << 20  # bytes; below, one copy through a pipe costs less than a file

MakeRow = Callable[[Pair, int], list[Sample] | str]


def samples_of(
    pair: Pair,
    seed: int,
    *,
    make_samples: MakeSamples,
    processor: Processor,
    masking: Masking | None,
    on_bad_row: str,
) -> list[Sample] | str:
    """What a stage makes of a pair: tokens and patches, masked; a pure function of pair and seed.

    With `on_bad_row="skip"` a pair that cannot be read yields the reason instead, never an invented
    image.
    """
    rng = np.random.default_rng(seed)
    try:
        samples = [
            processor(context, target, key=context.key, row_id=pair.row_id, role=role)
            for role, (context, target) in enumerate(make_samples(pair, rng))
        ]
    except UserError as error:
        if on_bad_row == "fail":
            raise
        return str(error)
    return samples if masking is None else [masking(sample, rng) for sample in samples]


class RowSamples(Dataset[list[Sample] | str]):
    """Rows of a stage, read in the workers: a pure function of (seed, epoch, index)."""

    def __init__(self, pairs: Sequence[Pair], make_row: MakeRow, *, seed: int) -> None:
        self.pairs = pairs
        self.make_row = make_row
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Index) -> list[Sample] | str:
        epoch, row = index
        return self.make_row(self.pairs[row], mix(self.seed, epoch, row))


def start_worker(worker: int) -> None:
    """Set up a data worker: it ends with the process that started it, and sends small tensors
    through its pipe; only large ones (pixels) go in shared memory of their own.

    A step holds hundreds of small tensors (where segments begin, who attends to whom); torch opens
    a file for each that it shares, and a process may have only so many files open.
    """
    end_with_parent(worker)
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


def check_mixing(train: Sequence[Pair] | PairStream, mixing: Mixing, *, batch_size: int) -> None:
    """Refuse a mixing that does not fit the data, before anything is trained.

    Raises:
        UserError: as `make_order` and `StreamBatches` would.
    """
    if isinstance(train, PairStream):
        mixing.shares(list(train.subsets), train.sizes)
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
        masking: hides parts of samples; None for a stage that hides nothing.
        collator, validation_collator: make batches of rows.
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
        masking: Masking | None,
        collator: Collator,
        validation_collator: Collator,
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
        self.collator, self.validation_collator = collator, validation_collator
        self.pinned = pinned
        self.make_row = partial(
            samples_of,
            make_samples=make_samples,
            processor=processor,
            masking=masking,
            on_bad_row=on_bad_row,
        )
        self.validation_rows = RowSamples(validation, self.make_row, seed=seed)
        self.on_bad_row = on_bad_row
        self.mixing = mixing
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.steps = steps
        self.start_step = start_step
        self.seed = seed
        self.num_workers = num_workers
        self._lanes: list[Places] = [{}] * max(1, num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        if isinstance(self.train, PairStream):
            return self._stream_loader(self.train)
        rows = RowSamples(self.train, self.make_row, seed=self.seed)
        sampler = StepSampler(
            make_order(self.train, self.mixing, batch_size=self.batch_size, seed=self.seed),
            steps=self.steps,
            start_step=self.start_step,
            rank=rank(),
            world_size=world_size(),
        )
        return self._loader(rows, sampler, self.collator)

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
            self.make_row,
            self.collator,
            batch_size=self.batch_size,
            steps=self.steps,
            start_step=self.start_step,
            seed=self.seed,
            on_bad_row=self.on_bad_row,
            rank=rank(),
            world_size=world_size(),
            places=self._lanes,
        )
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=start_worker,
            pin_memory=self.pinned,
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
        return self._loader(self.validation_rows, batches, self.validation_collator)

    def _loader(
        self, rows: RowSamples, batches: StepSampler | list[list[Index]], collator: Collator
    ) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=start_worker,
            pin_memory=self.pinned,
        )
