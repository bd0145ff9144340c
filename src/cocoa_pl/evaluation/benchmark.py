"""Score the vectors of evaluation subsets, which an `encode` callable or a store gives.

The scorer never sees a model. Every unique item is encoded once, also across subsets.
A benchmark never averages over fewer subsets than expected: what cannot be scored raises.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cocoa_pl.data.items import Item
from cocoa_pl.errors import UserError, renamed
from cocoa_pl.evaluation.figures import MAPPED_ROWS, Mapped, counted, flattened, sample
from cocoa_pl.evaluation.results import GalleryRow, RankedCandidate, Results, SubsetScore
from cocoa_pl.evaluation.scoring import (
    BLOCK,
    Hits,
    chance_level,
    check_embeddings,
    row_scores,
    score_rows,
)
from cocoa_pl.evaluation.vectors import Floats, evenly_spaced

if TYPE_CHECKING:
    from cocoa_pl.data.items import EvalSubset

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[Item]], Floats]  # items -> float32 [N, D], unit length
# A subset's number -> vectors of its queries and of its candidates; called in the subsets' order.
VectorsOf = Callable[[int], tuple[Floats, Floats]]


def evaluate(
    encode: Encode,
    subsets: Sequence["EvalSubset"],
    *,
    benchmark: str,
    checkpoint: str,
    expected: Sequence[str] | None = None,
    is_partial: bool = False,
    gallery_rows: int = 3,
) -> Results:
    """Encode every unique item once and score all subsets by both rules.

    Args:
        encode: called once per subset with the items not encoded before.
        expected: names of the benchmark's subsets; None trusts `subsets` to be complete.
        is_partial: `subsets` are a choice; no means are reported.
        gallery_rows: how many hits, and how many misses, of each subset go into the gallery.

    Raises:
        UserError: if a subset is missing, empty, twice there, or its embeddings are NaN, collapsed
            or not of unit length.
    """
    check_subsets(subsets, expected=expected)
    return score_subsets(
        encode_once(encode, subsets),
        subsets,
        benchmark=benchmark,
        checkpoint=checkpoint,
        is_partial=is_partial,
        gallery_rows=gallery_rows,
    )


def score_subsets(
    vectors_of: VectorsOf,
    subsets: Sequence["EvalSubset"],
    *,
    benchmark: str,
    checkpoint: str,
    is_partial: bool = False,
    gallery_rows: int = 3,
) -> Results:
    """Score checked subsets by both rules; vectors are read in blocks from where they lie.

    Raises:
        UserError: if embeddings of a subset are NaN, collapsed or not of unit length.
    """
    scores: list[SubsetScore] = []
    gallery: list[GalleryRow] = []
    mapped: list[Mapped] = []
    for number, subset in enumerate(subsets):
        logger.debug("%s %d/%d: %s", benchmark, number + 1, len(subsets), subset.name)
        queries, candidates = vectors_of(number)
        check_embeddings(queries, name=f"{subset.name} queries")
        check_embeddings(candidates, name=f"{subset.name} candidates")
        hits = score_rows(
            queries,
            candidates,
            query_index=subset.query_index,
            candidate_index=subset.candidate_index,
        )
        scores.append(
            SubsetScore(
                name=subset.name,
                group=subset.group,
                in_distribution=subset.in_distribution,
                precision_at_1=hits.precision_at_1,
                precision_at_1_strict=hits.precision_at_1_strict,
                num_queries=len(subset.query_index),
                num_candidates=len(subset.candidates),
                chance=chance_level(subset.candidate_index),
                similarities=counted(hits),
                num_without_choice=hits.num_without_choice,
            )
        )
        mapped += sample(subset, queries, candidates, rows=MAPPED_ROWS // len(subsets))
        for row in _sample_rows(hits, count=gallery_rows):
            gallery.append(_gallery_row(subset, row, hits, queries=queries, candidates=candidates))
    return Results(
        benchmark, checkpoint, tuple(scores), tuple(gallery), is_partial, space=flattened(mapped)
    )


def check_subsets(
    subsets: Sequence["EvalSubset"], *, expected: Sequence[str] | None = None
) -> None:
    """Refuse what cannot be scored before anything is encoded.

    Raises:
        UserError: if a subset is missing, empty or twice there, or a row has no candidates.
    """
    if not subsets:
        raise UserError("the benchmark has no subset; name at least one")
    names = [subset.name for subset in subsets]
    if missing := [name for name in expected or () if name not in names]:
        raise UserError(
            f"the benchmark lacks {', '.join(missing)}; a mean over fewer subsets than asked for "
            "compares with nothing: add them, or take them out of the benchmark's config"
        )
    for subset in subsets:
        if names.count(subset.name) > 1:
            raise UserError(f"{subset.name}: the subset is in the benchmark twice; keep one")
        if not len(subset.query_index):
            raise UserError(f"{subset.name}: no rows to score; check the subset's files")
        for row_id, candidates in zip(subset.row_ids, subset.candidate_index, strict=True):
            if not len(candidates):
                raise UserError(f"{row_id}: no candidates; give at least the positive")


def encode_once(encode: Encode, subsets: Sequence["EvalSubset"]) -> VectorsOf:
    """Embeddings in memory, encoded when a subset is the first to need them.

    To be called in the subsets' order: an embedding is dropped after the last subset that uses it.
    """
    query_keys = [[item.key for item in subset.queries] for subset in subsets]
    candidate_keys = [[item.key for item in subset.candidates] for subset in subsets]
    last_use = {
        key: number
        for number, keys in enumerate(zip(query_keys, candidate_keys, strict=True))
        for key in (*keys[0], *keys[1])
    }
    known: dict[int, Floats] = {}

    def encode_subset(number: int) -> tuple[Floats, Floats]:
        subset, keys = subsets[number], query_keys[number] + candidate_keys[number]
        items = dict(zip(keys, [*subset.queries, *subset.candidates], strict=True))
        new = {key: item for key, item in items.items() if key not in known}
        try:
            known.update(_encode_new(new, encode))
        except UserError as error:
            places = [keys.index(key) for key in new]
            raise renamed(error, lambda item: _name(subset, places[item])) from error
        queries = np.stack([known[key] for key in query_keys[number]])
        candidates = np.stack([known[key] for key in candidate_keys[number]])
        for key in items:
            if last_use[key] == number:
                del known[key]
        return queries, candidates

    return encode_subset


def _name(subset: "EvalSubset", place: int) -> str:
    """A query, or behind all of them a candidate, by the first row that it belongs to."""
    candidate = place - len(subset.queries)
    if candidate < 0:
        return f"{subset.row_ids[int((subset.query_index == place).argmax())]}, query"
    rows = (row for row, index in enumerate(subset.candidate_index) if candidate in index)
    return f"{subset.row_ids[next(rows)]}, candidate"


def _encode_new(items: Mapping[int, Item], encode: Encode) -> dict[int, Floats]:
    if not items:
        return {}
    embeddings = encode(list(items.values()))
    if embeddings.ndim != 2 or len(embeddings) != len(items):
        raise ValueError(
            f"encode returned shape {embeddings.shape} for {len(items)} items; expected [N, D]"
        )
    # Copies: a view would keep the whole array alive until its last row is dropped.
    return {key: row.copy() for key, row in zip(items, embeddings, strict=True)}


def _sample_rows(hits: Hits, *, count: int) -> list[int]:
    """Up to `count` misses and `count` hits, spread evenly over the subset, in row order."""
    rows: list[int] = []
    for hit in (False, True):
        found = np.flatnonzero(hits.strict == hit)
        rows.extend(int(row) for row in found[evenly_spaced(len(found), count=count)])
    return sorted(rows)


def _gallery_row(
    subset: "EvalSubset",
    row: int,
    hits: Hits,
    *,
    queries: Floats,
    candidates: Floats,
    top: int = 5,
) -> GalleryRow:
    query, index = subset.query_index[row], subset.candidate_index[row]
    scores = row_scores(queries[np.array([query])][0], candidates, index, block=BLOCK)
    order = np.argsort(-scores, kind="stable")  # ties keep row order: the positive comes first
    rank_of_positive = int(np.flatnonzero(order == 0)[0])
    places = [*range(min(top, len(order)))]
    if rank_of_positive >= top:
        places.append(rank_of_positive)
    ranked = tuple(
        RankedCandidate(
            item=subset.candidates[int(index[order[place]])],
            rank=place + 1,
            score=float(scores[order[place]]),
            is_positive=place == rank_of_positive,
        )
        for place in places
    )
    return GalleryRow(
        subset=subset.name,
        row_id=subset.row_ids[row],
        query=subset.queries[query],
        ranked=ranked,
        num_candidates=len(index),
        hit=bool(hits.strict[row]),
    )
