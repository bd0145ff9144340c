"""Score the vectors of evaluation subsets, which are in memory or in a store.

The scorer never sees a model. Every unique item is encoded once, also across subsets. What cannot
be scored raises: a benchmark never averages over fewer subsets than it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.distributed.collectives import all_objects, rank, world_size
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.figures import MAPPED_ROWS, Mapped, binned, flattened, sample
from cocoa_pl.evaluation.results import GalleryRow, RankedCandidate, Results, SubsetScore
from cocoa_pl.evaluation.scoring import (
    Floats,
    Hits,
    check_embeddings,
    evenly_spaced,
    row_scores,
    score_rows,
)
from cocoa_pl.evaluation.store import VectorStore, cache_keys, embed_missing

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[Item]], Floats]  # items -> float32 [N, D], unit length
# A subset's number -> vectors of its queries and of its candidates; called in the subsets' order.
VectorsOf = Callable[[int], tuple[Floats, Floats]]

GALLERY_ROWS = 3  # hits, and misses, of each subset
GALLERY_RANKS = 5  # candidates of a row, beside a positive that is farther down


@dataclass(frozen=True)
class VectorSettings:
    """How the items of a benchmark are embedded, and where their vectors are.

    Attributes:
        batch_tokens: that go through the model together.
        threads: that read and tokenize ahead of it.
        store: folder that keeps the vectors; None has them in memory, in float32.
        store_dtype: of the vectors in it.
    """

    batch_tokens: int = 8192
    threads: int = 4
    store: Path | None = None
    store_dtype: str = "float16"


IN_MEMORY = VectorSettings()


def score_subsets(
    vectors_of: VectorsOf,
    subsets: Sequence[EvalSubset],
    *,
    benchmark: str,
    checkpoint: str,
    is_partial: bool = False,
) -> Results:
    """Score checked subsets by both rules; vectors are read in blocks from where they lie.

    Args:
        is_partial: `subsets` are a choice; no means are reported.

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
                precision_at_1=float(hits.official.mean()),
                precision_at_1_strict=float(hits.strict.mean()),
                num_queries=len(subset.query_index),
                num_candidates=len(subset.candidates),
                chance=float(np.mean([1.0 / len(row) for row in subset.candidate_index])),
                num_queries_without_choice=int(np.isneginf(hits.hardest).sum()),
                positive_similarities=binned(hits.positive),
                hardest_negative_similarities=binned(hits.hardest),
            )
        )
        mapped += sample(subset, queries, candidates, rows=MAPPED_ROWS // len(subsets))
        gallery += _gallery(subset, hits, queries, candidates)
    return Results(
        benchmark, checkpoint, tuple(scores), tuple(gallery), is_partial, space=flattened(mapped)
    )


def check_subsets(subsets: Sequence[EvalSubset]) -> None:
    """Refuse what cannot be scored before anything is encoded.

    Raises:
        UserError: if there is no subset, one is empty or twice there, or a row has no candidates.
    """
    if not subsets:
        raise UserError("the benchmark has no subset; name at least one")
    names = [subset.name for subset in subsets]
    for subset in subsets:
        if names.count(subset.name) > 1:
            raise UserError(f"{subset.name}: the subset is in the benchmark twice; keep one")
        if not len(subset.query_index):
            raise UserError(f"{subset.name}: no rows to score; check the subset's files")
        for row_id, candidates in zip(subset.row_ids, subset.candidate_index, strict=True):
            if not len(candidates):
                raise UserError(f"{row_id}: no candidates; give at least the positive")


def embedded(model: Embedder, subsets: Sequence[EvalSubset], settings: VectorSettings) -> VectorsOf:
    """Where the subsets' vectors come from; a store has been filled by all processes by then."""
    given: Any = {"batch_tokens": settings.batch_tokens, "threads": settings.threads}
    if settings.store is None:
        return encode_once(partial(model.encode, **given), subsets)
    store = VectorStore(
        settings.store, identity=model.identity(), dim=model.dim, dtype=settings.store_dtype
    )
    keys = [(cache_keys(subset.queries), cache_keys(subset.candidates)) for subset in subsets]
    for subset, both in zip(subsets, keys, strict=True):
        embed_missing(
            store,
            [*subset.queries, *subset.candidates],
            np.concatenate(both),
            partial(model.stream, **given),
            rank=rank(),
            world_size=world_size(),
        )
    all_objects("done")  # scoring waits until every process has embedded its share
    store.reload()
    return lambda number: (store.vectors(keys[number][0]), store.vectors(keys[number][1]))


def encode_once(encode: Encode, subsets: Sequence[EvalSubset]) -> VectorsOf:
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
            if new:
                # Copies: a view would keep the whole array alive until its last row is dropped.
                known.update(
                    {k: v.copy() for k, v in zip(new, encode([*new.values()]), strict=True)}
                )
        except UserError as error:
            if error.item is not None:
                place = keys.index([*new][error.item])
                error.row_id, error.role = _name(subset, place)
            raise
        queries = np.stack([known[key] for key in query_keys[number]])
        candidates = np.stack([known[key] for key in candidate_keys[number]])
        for key in items:
            if last_use[key] == number:
                del known[key]
        return queries, candidates

    return encode_subset


def _name(subset: EvalSubset, place: int) -> tuple[str, str]:
    """The first row that a query, or behind all of them a candidate, belongs to, and its role."""
    candidate = place - len(subset.queries)
    if candidate < 0:
        return subset.row_ids[int((subset.query_index == place).argmax())], "query"
    rows = (row for row, index in enumerate(subset.candidate_index) if candidate in index)
    return subset.row_ids[next(rows)], "candidate"


def _gallery(
    subset: EvalSubset, hits: Hits, queries: Floats, candidates: Floats
) -> list[GalleryRow]:
    """Up to `GALLERY_ROWS` misses and as many hits, spread evenly over the subset, in row order."""
    rows: list[int] = []
    for hit in (False, True):
        found = np.flatnonzero(hits.strict == hit)
        rows += found[evenly_spaced(len(found), count=GALLERY_ROWS)].tolist()
    gallery = []
    for row in sorted(rows):
        query, index = subset.query_index[row], subset.candidate_index[row]
        scores = row_scores(queries[query], candidates, index)
        order = np.argsort(-scores, kind="stable")  # ties keep row order: the positive comes first
        place_of_positive = int(np.flatnonzero(order == 0)[0])
        places = [*range(min(GALLERY_RANKS, len(order)))]
        if place_of_positive >= GALLERY_RANKS:
            places.append(place_of_positive)
        ranked = tuple(
            RankedCandidate(
                item=subset.candidates[int(index[order[place]])],
                rank=place + 1,
                score=float(scores[order[place]]),
                is_positive=place == place_of_positive,
            )
            for place in places
        )
        gallery.append(
            GalleryRow(
                subset=subset.name,
                row_id=subset.row_ids[row],
                query=subset.queries[query],
                ranked=ranked,
                num_candidates=len(index),
                hit=bool(hits.strict[row]),
            )
        )
    return gallery
