"""Subsets and their sizes in, the subset of every sub-batch of every step out; no state at all.

A global batch is made of sub-batches, each from one subset: one (`one_subset`), several of equal
size (`interleaved`, as VLM2Vec-V2 does, arXiv 2507.04590), or as many as it has rows (`shuffled`).
Which subset a sub-batch comes from is drawn in cycles of `CYCLE` sub-batches: in each cycle a
subset with share p occurs CYCLE x p times, rounded up or down at random so that the mean is exact
(systematic sampling), in an order of the cycle's own. So shares hold over short stretches too, and
how often a subset occurred before any step follows from counting alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cocoa_pl.config.bounds import Count, NotNegative
from cocoa_pl.errors import UserError
from cocoa_pl.randomness import mix, uniform

Composition = Literal["shuffled", "one_subset", "interleaved"]

CYCLE = 1024
_OFFSET_STREAM, _ORDER_STREAM = 11, 12
_CYCLES_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Mixing:
    """How a stage composes its batches.

    Args:
        composition: `shuffled` draws every row on its own, `one_subset` whole batches, and
            `interleaved` equal sub-batches from one subset each.
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

    def shares(self, names: Sequence[str], sizes: np.ndarray) -> np.ndarray:
        """float64 [S], the share of each subset; they add up to one.

        Raises:
            UserError: for a weight of an unknown subset, or if all weights are 0 or too large.
        """
        given = self.weights or {}
        if unknown := [name for name in given if name not in names]:
            raise UserError(
                f"mixing.weights names {unknown[0]}, but the stage's data has {', '.join(names)}"
            )
        weights = np.array([given.get(name, 1.0) for name in names], dtype=np.float64)
        with np.errstate(over="ignore"):
            wanted = weights * np.asarray(sizes, dtype=np.float64) ** self.exponent
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


class Schedule:
    """The subset of every sub-batch.

    Args:
        shares: of the subsets, [S], adding up to one.
        sub_batches: of a step.
    """

    def __init__(self, shares: np.ndarray, *, sub_batches: int, seed: int) -> None:
        self.sub_batches = sub_batches
        self.num_subsets = len(shares)
        self._edges = CYCLE * np.cumsum(shares)
        self._edges[-1] = CYCLE
        self._seed = seed
        self._cycle: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def subsets(self, step: int) -> np.ndarray:
        """int64 [sub_batches], the subset of each sub-batch of a step."""
        start, stop = step * self.sub_batches, (step + 1) * self.sub_batches
        cycles = range(start // CYCLE, (stop - 1) // CYCLE + 1)
        drawn = np.concatenate([self._order(cycle) for cycle in cycles])
        offset = cycles[0] * CYCLE
        return drawn[start - offset : stop - offset]

    def count_before(self, step: int) -> np.ndarray:
        """int64 [S], how many sub-batches of each subset come before a step."""
        whole, rest = divmod(step * self.sub_batches, CYCLE)
        total = np.zeros(self.num_subsets, dtype=np.int64)
        for start in range(0, whole, _CYCLES_AT_A_TIME):
            cycles = np.arange(start, min(whole, start + _CYCLES_AT_A_TIME))
            total += self._counts(cycles).sum(axis=0)
        return total + np.bincount(self._order(whole)[:rest], minlength=self.num_subsets)

    def _counts(self, cycles: np.ndarray) -> np.ndarray:
        """int64 [C, S], occurrences in each cycle: how many of u, u + 1, ... lie between edges."""
        seed = torch.tensor(mix(self._seed))
        offsets = uniform(seed, torch.from_numpy(cycles), stream=_OFFSET_STREAM).double().numpy()
        below = np.ceil(self._edges - offsets[:, None]).astype(np.int64)
        return np.diff(below, axis=1, prepend=0)

    def _order(self, cycle: int) -> np.ndarray:
        if self._cycle[0] != cycle:
            counts = self._counts(np.array([cycle]))[0]
            generator = torch.Generator().manual_seed(mix(self._seed, _ORDER_STREAM, cycle))
            order = torch.randperm(CYCLE, generator=generator).numpy()
            self._cycle = (cycle, np.repeat(np.arange(self.num_subsets), counts)[order])
        return self._cycle[1]
