"""Mine the hard negatives of training pairs within each subset.

Positive-aware, after NV-Retriever (https://arxiv.org/abs/2407.15831, "TopK-PercPos"): a candidate
that is nearly as near as the positive is more likely another right answer than a hard wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.config.bounds import Count, ShareAboveZero
from cocoa_pl.data.items import Item, Pair, numbered
from cocoa_pl.errors import UserError, renamed

BLOCK_VALUES = 1 << 25  # similarities in memory together

Encode = Callable[[Sequence[Item]], NDArray[np.float32]]


@dataclass(frozen=True)
class Mined:
    """A subset with its negatives, and what a reader should know of them.

    Attributes:
        pairs: as they were, with the mined negatives in place of their own.
        positive: mean similarity of query and positive.
        hardest: mean similarity of query and hardest negative; NaN without any.
        spared: candidates that were left out as possibly right, a row.
    """

    subset: str
    pairs: list[Pair]
    positive: float
    hardest: float
    spared: float

    @property
    def negatives(self) -> float:
        """Of a row, in the mean."""
        return float(np.mean([len(pair.negatives) for pair in self.pairs]))


def mine(
    pairs: Sequence[Pair],
    encode: Encode,
    *,
    number: Count,
    max_of_positive: ShareAboveZero,
    keep: bool,
) -> Iterator[Mined]:
    """Subset by subset, in the order of first appearance.

    Args:
        encode: gives unit vectors.
        number: negatives of a row, at most.
        max_of_positive: as in `choose`.
        keep: a row's own negatives stay, before the mined ones.

    Raises:
        UserError: at once, if no subset has two answers.
    """
    rows: dict[str, list[Pair]] = {}
    for pair in pairs:
        rows.setdefault(pair.subset, []).append(pair)
    if not any(p.positive.key != some[0].positive.key for some in rows.values() for p in some):
        raise UserError(
            "there is nothing to mine: in each subset all rows have the same positive, and only "
            "positives of other rows become negatives"
        )

    def mined(subset: str, pairs: list[Pair]) -> Mined:
        queries, query = numbered([pair.query for pair in pairs])
        positives, positive = numbered([pair.positive for pair in pairs])

        def encoded(items: list[Item], numbers: list[int]) -> NDArray[np.float32]:
            try:
                return encode(items)
            except UserError as error:
                raise renamed(error, lambda item: pairs[numbers.index(item)].row_id) from error

        chosen = choose(
            encoded(queries, query),
            encoded(positives, positive),
            query=np.array(query, np.intp),
            positive=np.array(positive, np.intp),
            number=number,
            max_of_positive=max_of_positive,
        )
        found = []
        for pair, places in zip(pairs, chosen.candidates, strict=True):
            own = pair.negatives if keep else ()
            known = {item.key for item in own}
            new = [positives[place] for place in places if positives[place].key not in known]
            found.append(replace(pair, negatives=(*own, *new)))
        some = chosen.hardest[np.isfinite(chosen.hardest)]
        return Mined(
            subset,
            found,
            positive=float(chosen.positive.mean()),
            hardest=float(some.mean()) if len(some) else float("nan"),
            spared=float(chosen.spared.mean()),
        )

    return starmap(mined, rows.items())


class Chosen(NamedTuple):
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
    ends = np.cumsum(np.bincount(query, minlength=len(queries)))
    answers = np.split(positive[np.argsort(query, kind="stable")], ends[:-1])  # of each query
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


def _nearest(similarities: NDArray[np.float32], number: int) -> NDArray[np.intp]:
    """Places of the largest values that are left, the largest first; ties by place."""
    number = min(number, int(np.isfinite(similarities).sum()))
    if number == 0:
        return np.empty(0, np.intp)
    candidates = np.flatnonzero(similarities >= np.partition(similarities, -number)[-number])
    order = np.argsort(-similarities[candidates], kind="stable")
    return candidates[order[:number]]
