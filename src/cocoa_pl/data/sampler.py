"""The rows of every step, and how they are mixed from subsets: a function of seed and step alone.

Workers, ranks and interruptions change nothing: a run resumed at step k draws what the
uninterrupted run would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cocoa_pl.config.bounds import Count, NotNegative
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.errors import UserError

Index = tuple[int, int]  # epoch (of the data, or of the row's subset), row
Composition = Literal["shuffled", "one_subset", "interleaved"]

_MASK64 = (1 << 64) - 1
_CYCLE = 1024  # sub-batches over which shares hold
_SUBSETS, _ROWS = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class Mixing:
    """How a stage composes its batches.

    Args:
        composition: `shuffled` draws every row on its own, `one_subset` whole batches, and
            `interleaved` equal sub-batches from one subset each (VLM2Vec-V2, arXiv 2507.04590).
        sub_batches: of a global batch, for `interleaved`.
        exponent: a subset of n rows has a share in proportion to weight x n^exponent. 1 is by
            rows, 0 all alike; T5's temperature T (arXiv 1910.10683) is exponent 1/T, and XLM-R and
            mT5 (arXiv 1911.02116, 2010.11934) take 0.3.
        weights: of subsets, 1 where none is given; 0 leaves one out; None for no weights.

    Raises:
        UserError: for sub-batches without or apart from `interleaved`.
    """

    composition: Composition
    sub_batches: Count | None
    exponent: NotNegative
    weights: Mapping[str, NotNegative] | None

    def __post_init__(self) -> None:
        if (self.composition == "interleaved") != (self.sub_batches is not None):
            raise UserError("mixing.sub_batches is for composition=interleaved, and needed there")

    @property
    def by_rows(self) -> bool:
        """Whether every row of the data is as likely as any other, apart from its batch."""
        return self.composition == "shuffled" and self.exponent == 1 and not self.weights

    def shares(self, sizes: Mapping[str, int]) -> np.ndarray:
        """float64 [S], the share of each subset; they add up to one.

        Args:
            sizes: rows of each subset.

        Raises:
            UserError: for a weight of an unknown subset, or if all weights are 0 or too large.
        """
        given = self.weights or {}
        if unknown := [name for name in given if name not in sizes]:
            raise UserError(
                f"mixing.weights names {unknown[0]}, but the stage's data has {', '.join(sizes)}"
            )
        weights = np.array([given.get(name, 1.0) for name in sizes], dtype=np.float64)
        with np.errstate(over="ignore"):
            wanted = weights * np.array([*sizes.values()], dtype=np.float64) ** self.exponent
            total = wanted.sum()
        if not total > 0:
            raise UserError("mixing.weights are all 0; give at least one subset a positive weight")
        if not np.isfinite(total):
            raise UserError("mixing.exponent or mixing.weights are too large to give shares")
        return wanted / total

    def sub_batch_rows(self, batch_size: int) -> int:
        """Rows of a sub-batch of a global batch.

        Raises:
            UserError: if the batch cannot be cut into equal sub-batches.
        """
        count = {"shuffled": batch_size, "one_subset": 1}.get(self.composition, self.sub_batches)
        assert count is not None
        if batch_size % count:
            raise UserError(
                f"a batch of {batch_size} cannot be cut into {count} equal sub-batches; "
                "change mixing.sub_batches"
            )
        return batch_size // count

    def subsets(
        self, sizes: Mapping[str, int], *, batch_size: int, steps: int, seed: int
    ) -> np.ndarray:
        """int64 [steps, batch_size], the place of every row's subset among those of `sizes`."""
        each = self.sub_batch_rows(batch_size)
        count = steps * batch_size // each
        drawn = draw_subsets(self.shares(sizes), count=count, seed=mix(seed))
        return drawn.repeat(each).reshape(steps, batch_size)


def draw_subsets(shares: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """int64 [count], the subset of each sub-batch; a longer draw begins with the shorter one.

    In every 1024 sub-batches a subset of share p occurs 1024 p times, rounded up or down at random
    so that the mean is exact (systematic sampling), in random order.
    """
    cycles = [np.empty(0, np.int64)]
    for cycle in range(-(-count // _CYCLE)):
        rng = np.random.default_rng([seed, _SUBSETS, cycle])
        points = (np.arange(_CYCLE) + rng.random()) / _CYCLE
        subsets = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
        cycles.append(rng.permutation(subsets))
    return np.concatenate(cycles)[:count]


@dataclass
class StepSampler:
    """A batch sampler: this rank's rows of every step.

    Where every row is as likely as any other, each epoch is a fresh permutation of all, whole
    batches only. Otherwise sub-batches come from subsets by their shares, and each subset has
    epochs of its own: every row is used once before any is used again, and a batch shows no row
    twice, unless a subset has fewer than three batches of rows.

    Args:
        batch_size: rows of a step over all ranks.
        steps: of the whole run.
        start_step: where a resumed run goes on.

    Raises:
        UserError: if there are fewer pairs than a batch or sub-batch has, or the mixing does not
            fit the data.
    """

    pairs: Pairs
    mixing: Mixing
    batch_size: int
    seed: int
    steps: int
    start_step: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if len(self.pairs) < self.batch_size:
            raise UserError(
                f"the training data has {len(self.pairs)} rows, fewer than one batch of "
                f"{self.batch_size}; lower the stage's batch_size"
            )
        if self.mixing.by_rows:
            return
        names, codes = self.pairs.subset_codes()
        self._rows = [np.flatnonzero(codes == code) for code in range(len(names))]
        self._sizes = {name: len(rows) for name, rows in zip(names, self._rows, strict=True)}
        each = self.mixing.sub_batch_rows(self.batch_size)
        for name, share in zip(names, self.mixing.shares(self._sizes), strict=True):
            if share and self._sizes[name] < each:
                raise UserError(
                    f"{name} has {self._sizes[name]} rows, fewer than one sub-batch of {each}; "
                    "raise mixing.sub_batches, lower the stage's batch_size, "
                    f"or set mixing.weights.{name}=0"
                )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Index]]:
        for batch in self._all_rows() if self.mixing.by_rows else self._mixed_subsets():
            # Every world_size-th row: ranks share each sub-batch.
            yield batch[self.rank :: self.world_size]

    def _all_rows(self) -> Iterator[list[Index]]:
        per_epoch = len(self.pairs) // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.start_step, self.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order = torch.randperm(len(self.pairs), generator=generator)
            first = step % per_epoch * self.batch_size
            yield [(epoch, row) for row in order[first : first + self.batch_size].tolist()]

    def _mixed_subsets(self) -> Iterator[list[Index]]:
        drawn = self.mixing.subsets(
            self._sizes, batch_size=self.batch_size, steps=self.steps, seed=self.seed
        )
        used = np.bincount(drawn[: self.start_step].ravel(), minlength=len(self._rows)).tolist()
        orders: dict[int, tuple[int, np.ndarray]] = {}  # subset -> its epoch at hand
        for subsets in drawn[self.start_step :].tolist():
            batch = []
            for subset in subsets:
                epoch, place = divmod(used[subset], len(self._rows[subset]))
                if orders.get(subset, (None,))[0] != epoch:
                    orders[subset] = (epoch, self._order(subset, epoch))
                batch.append((epoch, int(orders[subset][1][place])))
                used[subset] += 1
            yield batch

    def _order(self, subset: int, epoch: int) -> np.ndarray:
        order = self._permutation(subset, epoch)
        # No row twice in a batch that begins in one epoch and ends in the next: rows that the last
        # batch of the epoch before has shown come after as many others. Only the first two thirds
        # change for it, so no order depends on more than the one before.
        apart = min(self.batch_size, len(order) // 3)
        start = order[: 2 * apart]
        is_late = np.isin(start, self._permutation(subset, epoch - 1)[-apart:])
        return np.concatenate([start[~is_late], start[is_late], order[2 * apart :]])

    def _permutation(self, subset: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([mix(self.seed), _ROWS, subset, epoch + 1])
        return rng.permutation(self._rows[subset])


def mix(*values: int) -> int:
    """Fold integers into one 63-bit seed, e.g. `mix(run_seed, epoch, row)`.

    By the finaliser of SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195).
    """
    state = 0
    for value in values:
        state = (state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1
