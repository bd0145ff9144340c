"""Training pairs in, each with hard negatives out of its own subset out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.config.bounds import Count, ShareAboveZero
from cocoa_pl.data.items import Item, Pair, numbered
from cocoa_pl.errors import UserError, renamed
from cocoa_pl.mining.choice import choose

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
    return (
        _mine_subset(
            subset, some, encode, number=number, max_of_positive=max_of_positive, keep=keep
        )
        for subset, some in rows.items()
    )


def _mine_subset(
    subset: str,
    pairs: list[Pair],
    encode: Encode,
    *,
    number: int,
    max_of_positive: float,
    keep: bool,
) -> Mined:
    queries, query = numbered([pair.query for pair in pairs])
    positives, positive = numbered([pair.positive for pair in pairs])

    def encoded(items: list[Item], numbers: list[int]) -> NDArray[np.float32]:
        try:
            return encode(items)
        except UserError as error:
            raise renamed(error, lambda number: pairs[numbers.index(number)].row_id) from error

    chosen = choose(
        encoded(queries, query),
        encoded(positives, positive),
        query=np.array(query, np.intp),
        positive=np.array(positive, np.intp),
        number=number,
        max_of_positive=max_of_positive,
    )
    mined = []
    for pair, places in zip(pairs, chosen.candidates, strict=True):
        own = pair.negatives if keep else ()
        known = {item.key for item in own}
        found = (positives[place] for place in places)
        new = tuple(item for item in found if item.key not in known)
        mined.append(replace(pair, negatives=(*own, *new)))
    some = chosen.hardest[np.isfinite(chosen.hardest)]
    return Mined(
        subset,
        mined,
        positive=float(chosen.positive.mean()),
        hardest=float(some.mean()) if len(some) else float("nan"),
        spared=float(chosen.spared.mean()),
    )
