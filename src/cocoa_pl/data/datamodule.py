"""Pairs in, packed batches out: what a stage trains and validates on."""

import logging
from collections.abc import Sequence

import lightning as L
from torch.utils.data import DataLoader, Dataset

from cocoa_pl.batch import Encoded, Rows, pack
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.sampler import Index, StepSampler
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.distributed import rank, world_size
from cocoa_pl.errors import UserError
from cocoa_pl.items import Pair
from cocoa_pl.randomness import mix

log = logging.getLogger(__name__)

_VALIDATION_EPOCH = -1  # its corruption is drawn once and for all


class EncodedRows(Dataset[list[Encoded] | str]):
    """Rows of a stage, opened and tokenized in the workers.

    A row is a pure function of (seed, epoch, index). With `on_bad_row="skip"` a row that cannot be
    read yields the reason instead, never an invented image.
    """

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
        self.make_samples = make_samples
        self.processor = processor
        self.seed = seed
        self.on_bad_row = on_bad_row

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Index) -> list[Encoded] | str:
        epoch, row = index
        pair, seed = self.pairs[row], mix(self.seed, epoch, row)
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


class StageData(L.LightningDataModule):
    """Training and validation batches of one stage.

    Args:
        train, validation: pairs; an empty validation list means none.
        batch_size: rows of a step over all ranks.
        validation_batch_size: rows at a time on a rank.
        start_step: first step to draw, for a resumed run.
    """

    def __init__(
        self,
        train: Sequence[Pair],
        validation: Sequence[Pair],
        *,
        make_samples: MakeSamples,
        processor: Processor,
        batch_size: int,
        validation_batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        num_workers: int,
        on_bad_row: str,
    ) -> None:
        super().__init__()
        self.train_rows = EncodedRows(
            train, make_samples, processor, seed=seed, on_bad_row=on_bad_row
        )
        self.validation_rows = EncodedRows(
            validation, make_samples, processor, seed=seed, on_bad_row=on_bad_row
        )
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.steps = steps
        self.start_step = start_step
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Rows]:
        sampler = StepSampler(
            num_rows=len(self.train_rows),
            global_batch_size=self.batch_size,
            steps=self.steps,
            start_step=self.start_step,
            seed=self.seed,
            rank=rank(),
            world_size=world_size(),
        )
        return self._loader(self.train_rows, sampler)

    def val_dataloader(self) -> DataLoader[Rows] | list[None]:
        if not len(self.validation_rows):
            return []
        mine = range(rank(), len(self.validation_rows), world_size())
        size = self.validation_batch_size
        batches = [
            [(_VALIDATION_EPOCH, row) for row in mine[start : start + size]]
            for start in range(0, len(mine), size)
        ]
        return self._loader(self.validation_rows, batches)

    def _loader(
        self, rows: EncodedRows, batches: StepSampler | list[list[Index]]
    ) -> DataLoader[Rows]:
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=False,
        )
