"""Pairs without a validation split in, a training and a validation part out."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cocoa_pl.config.bounds import ShareBelowOne
from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Item, Pair, numbered
from cocoa_pl.data.pair_table import select, subset_codes
from cocoa_pl.errors import UserError


def hold_out(
    pairs: Sequence[Pair], *, fraction: ShareBelowOne, seed: int, source: str
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Training and validation pairs; rows with the same image, or else query, stay together.

    Of each subset the same share of such groups is held out, at least one; 0 holds out nothing. The
    choice depends on the seed and the rows themselves, not on their order.

    Raises:
        UserError: a subset with a single group.
    """
    if fraction == 0:
        return pairs, []
    names, codes = subset_codes(pairs)
    groups = np.fromiter((group_key(pair) for pair in pairs), dtype=np.int64, count=len(pairs))
    is_held_out = np.zeros(len(pairs), dtype=bool)
    for code, subset in enumerate(names):
        rows = np.flatnonzero(codes == code)
        keys = np.unique(groups[rows]).tolist()
        if len(keys) < 2:
            raise UserError(
                f"{source}: {subset} has one distinct image or query, so none can be held out; "
                "set validation_fraction to 0"
            )
        ranked = sorted(keys, key=lambda key: _mixed(key, seed=seed))
        chosen = ranked[: min(math.ceil(fraction * len(keys)), len(keys) - 1)]
        is_held_out[rows] = np.isin(groups[rows], chosen)
    return (
        select(pairs, np.flatnonzero(~is_held_out)),
        select(pairs, np.flatnonzero(is_held_out)),
    )


def group_key(pair: Pair) -> int:
    """What rows have in common that must not be split between training and validation."""
    images = pair.query.media or pair.positive.media
    return Item(IMAGE_SLOT, images[:1]).key if images else pair.query.key


def as_subsets(pairs: Sequence[Pair], *, max_rows: int) -> list[EvalSubset]:
    """One retrieval task for each subset: its first `max_rows` rows, among their positives.

    A row's candidates leave out the other positives of its own query, which are right answers too.
    """
    by_subset: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_subset[pair.subset].append(pair)
    return [_as_subset(name, rows[:max_rows]) for name, rows in by_subset.items()]


def _as_subset(name: str, rows: Sequence[Pair]) -> EvalSubset:
    queries, query_index = numbered([row.query for row in rows])
    candidates, positive_index = numbered([row.positive for row in rows])
    answers: dict[int, list[int]] = defaultdict(list)
    for query, positive in zip(query_index, positive_index, strict=True):
        answers[query].append(positive)
    everything = np.arange(len(candidates), dtype=np.int32)
    return EvalSubset(
        name=name,
        group="retrieval",
        in_distribution=True,
        queries=queries,
        candidates=candidates,
        query_index=np.asarray(query_index, dtype=np.int32),
        candidate_index=[
            np.concatenate([everything[[positive]], np.delete(everything, answers[query])])
            for query, positive in zip(query_index, positive_index, strict=True)
        ],
        row_ids=[row.row_id for row in rows],
    )


def _mixed(key: int, *, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
