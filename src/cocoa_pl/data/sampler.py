"""A step number in, the rows of this rank's share of that step's global batch out; no state at all.

The order depends on the seed alone: not on the number of workers, and a run resumed at step k draws
what the uninterrupted run would have drawn.
"""

from collections.abc import Iterator

import torch

from cocoa_pl.errors import UserError
from cocoa_pl.randomness import mix

Index = tuple[int, int]  # epoch, row


class StepSampler:
    """A batch sampler: a fresh permutation each epoch, whole batches only.

    Args:
        num_rows: of the dataset.
        global_batch_size: rows of a step over all ranks.
        steps: of the whole run.
        start_step: where a resumed run goes on.

    Raises:
        UserError: if the dataset is smaller than one global batch or ranks cannot share it evenly.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        global_batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if num_rows < global_batch_size:
            raise UserError(
                f"the training data has {num_rows} rows, fewer than one batch of "
                f"{global_batch_size}; lower the stage's batch_size"
            )
        if global_batch_size % world_size:
            raise UserError(
                f"a batch of {global_batch_size} cannot be shared by {world_size} ranks"
            )
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.steps = steps
        self.start_step = start_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Index]]:
        per_epoch = self.num_rows // self.global_batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start_step, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order = torch.randperm(self.num_rows, generator=generator)
            start = step % per_epoch * self.global_batch_size
            rows = order[start : start + self.global_batch_size][self.rank :: self.world_size]
            yield [(epoch, row) for row in rows.tolist()]
