"""Candidate lists of evaluation rows in, each distinct list kept once out.

A million rows over a thousand classes are one list and a million positives: 4 MB instead of 4 GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class CandidateRows(Sequence[np.ndarray]):
    """For each row its candidates, int32 [C], the positive first.

    Rows with the same candidates share a list, whatever order they name them in: behind its
    positive, such a row has the order of the first one.

    Attributes:
        lists: the distinct lists, int32 [C].
        list_of_row: int32 [Q], each row's place in `lists`.
        positive: int32 [Q], each row's positive, one of its list.
    """

    def __init__(
        self, lists: Sequence[np.ndarray], list_of_row: np.ndarray, positive: np.ndarray
    ) -> None:
        assert len(list_of_row) == len(positive)
        self.lists = tuple(lists)
        self.list_of_row = list_of_row
        self.positive = positive

    @classmethod
    def of(cls, rows: Iterable[np.ndarray]) -> CandidateRows:
        """Rows with the positive first."""
        table = CandidateTable()
        table.extend(rows)
        return table.rows()

    @classmethod
    def shared(cls, candidates: np.ndarray, positive: np.ndarray) -> CandidateRows:
        """All rows have the same candidates [C]; `positive` [Q] says which one each is to find."""
        return cls([candidates], np.zeros(len(positive), np.int32), positive)

    def __len__(self) -> int:
        return len(self.list_of_row)

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, row: slice) -> list[np.ndarray]: ...
    def __getitem__(self, row: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        candidates, positive = self.lists[self.list_of_row[row]], self.positive[row]
        if not len(candidates) or candidates[0] == positive:
            return candidates
        place = int((candidates == positive).argmax())
        return np.concatenate([candidates[[place]], candidates[:place], candidates[place + 1 :]])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> CandidateRows:
        """Some of the rows, and of the lists those that they use."""
        chosen = self.list_of_row[rows]
        used, renumbered = np.unique(chosen, return_inverse=True)
        return CandidateRows(
            [self.lists[number] for number in used],
            renumbered.reshape(-1).astype(np.int32),
            self.positive[rows],
        )

    def renumbered(self, rank: np.ndarray) -> CandidateRows:
        """The same rows where candidate c has become `rank[c]`."""
        return CandidateRows(
            [rank[one] for one in self.lists], self.list_of_row, rank[self.positive]
        )


def row_lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [Q], candidates of each row."""
    if isinstance(rows, CandidateRows):
        return np.array([len(one) for one in rows.lists], np.int64)[rows.list_of_row]
    return np.array([len(row) for row in rows], np.int64)


class CandidateTable:
    """Takes rows as they are read; only distinct lists stay in memory."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._lists: list[np.ndarray] = []
        self._list_of_row: list[int] = []
        self._positive: list[int] = []

    def extend(self, rows: Iterable[np.ndarray]) -> None:
        """Add rows, int [C] with the positive first; an empty one has no positive."""
        for row in rows:
            content = np.sort(row).astype(np.int32).tobytes()
            number = self._numbers.setdefault(hashlib.blake2b(content).digest(), len(self._lists))
            if number == len(self._lists):
                self._lists.append(np.array(row, dtype=np.int32))  # a copy: the row may be a view
            self._list_of_row.append(number)
            self._positive.append(int(row[0]) if len(row) else -1)

    def rows(self) -> CandidateRows:
        """All rows so far."""
        return CandidateRows(
            self._lists, np.array(self._list_of_row, np.int32), np.array(self._positive, np.int32)
        )
