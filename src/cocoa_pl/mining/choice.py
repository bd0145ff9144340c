"""Vectors of queries and of candidates in, the hard negatives of each row out.

Positive-aware, after NV-Retriever (https://arxiv.org/abs/2407.15831, "TopK-PercPos"): a candidate
that is nearly as near as the positive is more likely another right answer than a hard wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_VALUES = 1 << 25  # similarities in memory together


@dataclass(frozen=True)
class Chosen:
    """What was chosen for each row.

    Attributes:
        candidates: for each row, positions of its negatives, the hardest first; fewer where no more
            candidates are left.
        positive: (rows) similarity of query and positive.
        hardest: (rows) similarity of the hardest negative, NaN without one.
        spared: (rows) candidates left out because they may be right.
    """

    candidates: list[NDArray[np.intp]]
    positive: NDArray[np.float32]
    hardest: NDArray[np.float32]
    spared: NDArray[np.int64]


def choose(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    *,
    query: NDArray[np.intp],
    positive: NDArray[np.intp],
    number: int,
    max_of_positive: float,
) -> Chosen:
    """The `number` nearest candidates of each row that are wrong answers.

    Left out are the answers of every row with the same query, and candidates whose similarity is
    above `max_of_positive` times that of the positive (or above it, where that is negative).

    Args:
        queries, candidates: (Q, D) and (C, D), distinct and of unit length.
        query, positive: (rows) places of a row's query and positive in them.
    """
    answers = _answers(query, positive, len(queries))
    rows_at_once = max(1, BLOCK_VALUES // max(1, len(candidates)))
    chosen: list[NDArray[np.intp]] = []
    of_positive = np.empty(len(query), np.float32)
    hardest = np.full(len(query), np.nan, np.float32)
    spared = np.zeros(len(query), np.int64)
    for start in range(0, len(query), rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, len(query)))
        similarities = queries[query[rows]] @ candidates.T
        own = similarities[np.arange(len(rows)), positive[rows]]
        for place, row in enumerate(rows):
            similarities[place, answers[query[row]]] = -np.inf
        limit = np.minimum(own * max_of_positive, own)
        may_be_right = similarities > limit[:, None]
        similarities[may_be_right] = -np.inf
        of_positive[rows], spared[rows] = own, may_be_right.sum(axis=1)
        for place, row in enumerate(rows):
            nearest = _nearest(similarities[place], number)
            chosen.append(nearest)
            if len(nearest):
                hardest[row] = similarities[place, nearest[0]]
    return Chosen(chosen, of_positive, hardest, spared)


def _answers(
    query: NDArray[np.intp], positive: NDArray[np.intp], num_queries: int
) -> list[NDArray[np.intp]]:
    """Query -> all candidates that some row names as its answer."""
    order = np.argsort(query, kind="stable")
    ends = np.cumsum(np.bincount(query, minlength=num_queries))
    return np.split(positive[order], ends[:-1])


def _nearest(similarities: NDArray[np.float32], number: int) -> NDArray[np.intp]:
    """Places of the largest values that are left, the largest first; ties by place."""
    number = min(number, int(np.isfinite(similarities).sum()))
    if number == 0:
        return np.empty(0, np.intp)
    candidates = np.flatnonzero(similarities >= np.partition(similarities, -number)[-number])
    order = np.argsort(-similarities[candidates], kind="stable")
    return candidates[order[:number]]
