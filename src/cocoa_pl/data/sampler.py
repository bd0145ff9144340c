"""A step number in, the rows of this rank's share of that step's global batch out; no state at all.

The order depends on the seed alone: not on the number of workers, and a run resumed at step k draws
what the uninterrupted run would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from cocoa_pl.data.items import Pair
from cocoa_pl.data.mixing import Mixing, Schedule
from cocoa_pl.data.pair_table import subset_codes
from cocoa_pl.errors import UserError
from cocoa_pl.randomness import mix

Index = tuple[int, int]  # epoch (of the data, or of the row's subset), row


class Order(Protocol):
    """The rows of every global batch."""

    batch_size: int

    def batches(self, start: int, stop: int) -> Iterator[Sequence[Index]]:
        """The global batches of the steps from `start` to before `stop`."""


def make_order(pairs: Sequence[Pair], mixing: Mixing, *, batch_size: int, seed: int) -> Order:
    """The order in which a stage sees these pairs.

    Raises:
        UserError: if there are fewer pairs than a batch or sub-batch has, or the mixing does not
            fit the data.
    """
    if len(pairs) < batch_size:
        raise UserError(
            f"the training data has {len(pairs)} rows, fewer than one batch of "
            f"{batch_size}; lower the stage's batch_size"
        )
    if mixing.by_rows:
        return AllRows(len(pairs), batch_size=batch_size, seed=seed)
    names, codes = subset_codes(pairs)
    return MixedSubsets(names, codes, mixing, batch_size=batch_size, seed=seed)


class AllRows:
    """A fresh permutation of all rows each epoch, whole batches only."""

    def __init__(self, num_rows: int, *, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed

    def batches(self, start: int, stop: int) -> Iterator[Sequence[Index]]:
        per_epoch = self.num_rows // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(start, stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order = torch.randperm(self.num_rows, generator=generator)
            first = step % per_epoch * self.batch_size
            yield [(epoch, row) for row in order[first : first + self.batch_size].tolist()]


class MixedSubsets:
    """Sub-batches from subsets as a `Schedule` says; each subset has epochs of its own.

    Every row of a subset is used once before any is used again. A batch shows no row twice, unless
    a subset has fewer than three batches of rows.

    Args:
        names: of the subsets.
        codes: [N], each row's place among them.
    """

    def __init__(
        self, names: Sequence[str], codes: np.ndarray, mixing: Mixing, *, batch_size: int, seed: int
    ) -> None:
        sizes = np.bincount(codes, minlength=len(names))
        shares = mixing.shares(names, sizes)
        self.batch_size = batch_size
        self.sub_batch_rows = mixing.sub_batch_rows(batch_size)
        for name, size, share in zip(names, sizes, shares, strict=True):
            if share and size < self.sub_batch_rows:
                raise UserError(
                    f"{name} has {size} rows, fewer than one sub-batch of {self.sub_batch_rows}; "
                    "raise mixing.sub_batches, lower the stage's batch_size, "
                    f"or set mixing.weights.{name}=0"
                )
        self.schedule = Schedule(
            shares, sub_batches=batch_size // self.sub_batch_rows, seed=mix(seed)
        )
        self._subsets = [
            _SubsetOrder(np.flatnonzero(codes == code), apart=batch_size, seed=mix(seed, code))
            for code in range(len(names))
        ]

    def batches(self, start: int, stop: int) -> Iterator[Sequence[Index]]:
        used = self.schedule.count_before(start)
        for step in range(start, stop):
            batch: list[Index] = []
            for subset in self.schedule.subsets(step).tolist():
                position = int(used[subset]) * self.sub_batch_rows
                batch += self._subsets[subset].take(position, self.sub_batch_rows)
                used[subset] += 1
            yield batch


class _SubsetOrder:
    """An endless sequence of a subset's rows: one permutation after the other.

    The first rows of a permutation are none of the last ones of the permutation before: any
    `apart` rows in a row are different (a third of the subset, if that is less). Only the first two
    thirds are changed for it, so that no permutation depends on more than the one before.
    """

    def __init__(self, rows: np.ndarray, *, apart: int, seed: int) -> None:
        self.rows = rows
        self.apart = min(apart, len(rows) // 3)
        self.seed = seed
        self._known: tuple[int, np.ndarray] = (-1, rows)

    def take(self, position: int, count: int) -> list[Index]:
        """Rows from this place of the sequence on."""
        found: list[Index] = []
        while len(found) < count:
            epoch, place = divmod(position + len(found), len(self.rows))
            stop = min(len(self.rows), place + count - len(found))
            found += [(epoch, row) for row in self._order(epoch)[place:stop].tolist()]
        return found

    def _order(self, epoch: int) -> np.ndarray:
        if self._known[0] != epoch:
            self._known = (epoch, self._separated(epoch))
        return self._known[1]

    def _separated(self, epoch: int) -> np.ndarray:
        order = self._permutation(epoch)
        if not epoch or not self.apart:
            return order
        just_used = self._permutation(epoch - 1)[-self.apart :]
        start = order[: 2 * self.apart]
        free = np.flatnonzero(~np.isin(start, just_used))[: self.apart]
        rest = np.delete(start, free)
        return np.concatenate([start[free], rest, order[2 * self.apart :]])

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        return self.rows[torch.randperm(len(self.rows), generator=generator).numpy()]


class StepSampler:
    """A batch sampler: this rank's rows of every step.

    Args:
        steps: of the whole run.
        start_step: where a resumed run goes on.

    Raises:
        UserError: if ranks cannot share a batch evenly.
    """

    def __init__(
        self, order: Order, *, steps: int, start_step: int, rank: int, world_size: int
    ) -> None:
        check_shareable(order.batch_size, world_size)
        self.order = order
        self.steps = steps
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Index]]:
        for batch in self.order.batches(self.start_step, self.steps):
            # Every world_size-th row: ranks share each sub-batch.
            yield list(batch[self.rank :: self.world_size])


def check_shareable(batch_size: int, world_size: int) -> None:
    """Refuse a global batch that ranks cannot share evenly."""
    if batch_size % world_size:
        raise UserError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
