"""Score the vectors of evaluation subsets.

The scorer never sees a model. What cannot be scored raises: a benchmark never averages over fewer
subsets than it has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cocoa_pl.data.items import EvalSubset
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.figures import MAPPED_ROWS, Mapped, flattened, sample
from cocoa_pl.evaluation.results import GalleryRow, RankedCandidate, Results, SubsetScore
from cocoa_pl.evaluation.scoring import (
    Floats,
    Ranks,
    binned,
    check_embeddings,
    evenly_spaced,
    metrics,
    rank_positives,
    to_float32,
)
from cocoa_pl.losses import matryoshka

logger = logging.getLogger(__name__)

GALLERY_ROWS = 3  # hits, and misses, of each subset
GALLERY_RANKS = 5  # candidates of a row, beside a positive that is farther down


def score_subsets(
    vectors: Iterable[tuple[Floats, Floats]],
    subsets: Sequence[EvalSubset],
    *,
    benchmark: str,
    checkpoint: str,
    is_partial: bool = False,
    widths: Sequence[int] = (),
) -> Results:
    """Score checked subsets by both rules.

    Args:
        vectors: of each subset its queries [U, D] and its candidates [N, D], of unit length.
        is_partial: `subsets` are a choice; no means are reported.
        widths: leading components that are scored alone too, as the model was trained for them.

    Raises:
        UserError: if embeddings of a subset are NaN, collapsed or not of unit length.
    """
    scores: list[SubsetScore] = []
    gallery: list[GalleryRow] = []
    mapped: list[Mapped] = []
    for subset, both in zip(subsets, vectors, strict=True):
        logger.debug("%s %d/%d: %s", benchmark, len(scores) + 1, len(subsets), subset.name)
        ranks = _ranks(subset, *both, where=subset.name)
        found = metrics(ranks.official, ranks.strict)
        choices = np.array([len(np.unique(index)) for index in subset.candidate_index])
        of_width = {}
        for width in widths:
            cut = [matryoshka(torch.from_numpy(to_float32(v)), [width])[0].numpy() for v in both]
            at_width = _ranks(subset, *cut, where=f"{subset.name}, {width} components:")
            of_width[str(width)] = metrics(at_width.official, at_width.strict)["precision_at_1"]
        scores.append(
            SubsetScore(
                name=subset.name,
                group=subset.group,
                in_distribution=subset.in_distribution,
                precision_at_1=found.pop("precision_at_1"),
                precision_at_1_strict=found.pop("precision_at_1_strict"),
                num_queries=len(subset.query_index),
                num_candidates=len(subset.candidates),
                chance=float((1 / choices).mean()),
                num_queries_without_choice=int((choices == 1).sum()),
                more=found,
                widths=of_width,
                positive_similarities=binned(ranks.positive),
                hardest_negative_similarities=binned(ranks.hardest),
            )
        )
        mapped += sample(subset, *both, rows=MAPPED_ROWS // len(subsets))
        gallery += _gallery(subset, ranks, *both)
    return Results(
        benchmark, checkpoint, tuple(scores), tuple(gallery), is_partial, space=flattened(mapped)
    )


def _ranks(subset: EvalSubset, queries: Floats, candidates: Floats, *, where: str) -> Ranks:
    check_embeddings(queries, name=f"{where} queries")
    check_embeddings(candidates, name=f"{where} candidates")
    return rank_positives(
        queries,
        candidates,
        query_index=subset.query_index,
        candidate_index=subset.candidate_index,
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
                raise UserError("no candidates; give at least the positive", row_id=row_id)


def _gallery(
    subset: EvalSubset, ranks: Ranks, queries: Floats, candidates: Floats
) -> list[GalleryRow]:
    """Up to `GALLERY_ROWS` misses and as many hits, spread evenly over the subset, in row order."""
    rows: list[int] = []
    for hit in (False, True):
        found = np.flatnonzero((ranks.strict == 1) == hit)
        rows += found[evenly_spaced(len(found), count=GALLERY_ROWS)].tolist()
    gallery = []
    for row in sorted(rows):
        query = subset.query_index[row]
        index = np.array([*dict.fromkeys(subset.candidate_index[row].tolist())])  # each one once
        # In float64, where equal candidates have equal scores.
        scores = (candidates[index].astype(np.float64) * queries[query]).sum(axis=1)
        order = np.argsort(-scores, kind="stable")  # ties keep row order: the positive comes first
        place_of_positive = int(np.flatnonzero(order == 0)[0])
        places = sorted({*range(min(GALLERY_RANKS, len(order))), place_of_positive})
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
                hit=bool(ranks.strict[row] == 1),
            )
        )
    return gallery
