"""Embeddings and each row's candidates in, hits out: precision@1 by MMEB's and a strict rule.

Shapes: U unique queries, N unique candidates, Q rows, K candidates of a row (ragged), D dimensions.
In every row the first candidate is the positive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.errors import UserError

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

# Embeddings normalised in bfloat16 miss unit length by up to about 0.004.
UNIT_TOLERANCE = 1e-2
# Unit vectors closer than this have a cosine above 1 - 5e-7, which float32 cannot tell from 1.
COLLAPSE_DISTANCE = 1e-3
# Cosines of float32 unit vectors carry no information below this.
TIE = 1e-6
# A float32 matrix product may differ by this much between two equal columns.
_ROUNDING = 1e-5
# Scores held in memory at once: 64 MiB of float32.
_BLOCK_SCORES = 1 << 24


@dataclass(frozen=True)
class Hits:
    """Which rows found their positive; both arrays are bool [Q]."""

    official: Bools
    strict: Bools

    @property
    def precision_at_1(self) -> float:
        return float(self.official.mean())

    @property
    def precision_at_1_strict(self) -> float:
        return float(self.strict.mean())


def check_embeddings(embeddings: Floats, *, name: str) -> None:
    """Refuse embeddings [N, D] that would make a score meaningless; `name` says whose they are.

    A NaN or a constant vector makes all candidates tie, and ties count for the positive: unchecked,
    a broken model scores 100 %.

    Raises:
        UserError: on NaN or inf, rows that are not of unit length, or N > 1 rows all alike.
    """
    finite: Bools = np.asarray(np.isfinite(embeddings).all(axis=1))
    if not finite.all():
        raise UserError(
            f"{name}: {_some(~finite)} NaN or inf; "
            "check the checkpoint, or evaluate in a wider precision (float32)"
        )
    length = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    unit = np.abs(length - 1.0) <= UNIT_TOLERANCE
    if not unit.all():
        worst = length[np.abs(length - 1.0).argmax()]
        raise UserError(
            f"{name}: {_some(~unit)} a length other than 1 (worst {worst:.4g}); "
            "normalise the embeddings before scoring"
        )
    if len(embeddings) > 1:
        # |x - y|² without a copy of all embeddings
        cosine = np.einsum("nd,d->n", embeddings, embeddings[0], dtype=np.float64)
        squared = np.square(length) + np.square(length[0]) - 2 * cosine
        if squared.max() < COLLAPSE_DISTANCE**2:
            raise UserError(
                f"{name}: all {len(embeddings)} embeddings are the same vector (collapsed); "
                "train on with a lower learning rate, or check that the inputs reach the model"
            )


def score_rows(
    queries: Floats,
    candidates: Floats,
    *,
    query_index: Ints,
    candidate_index: Sequence[Ints],
    block_scores: int = _BLOCK_SCORES,
) -> Hits:
    """Score every row's query against that row's own candidates by cosine.

    Args:
        queries: [U, D] and candidates: [N, D], unit length, each unique item encoded once.
        query_index: [Q] row -> query.
        candidate_index: per row the indices [K] of its candidates, K may differ from row to row.
        block_scores: how many scores are held in memory at once.
    """
    official = np.zeros(len(query_index), dtype=bool)
    strict = np.zeros(len(query_index), dtype=bool)
    for rows in _row_blocks(len(query_index), max(1, block_scores // len(candidates))):
        index = _pad([candidate_index[row] for row in range(rows.start, rows.stop)])  # [B, K]
        every = queries[query_index[rows]] @ candidates.T  # [B, N]
        scores = np.where(index < 0, -np.inf, np.take_along_axis(every, index, axis=1))
        official[rows], strict[rows] = rule_hits(scores, index)
        # The matrix product rounds equal columns differently: settle close rows one by one.
        lead = scores[:, 0] - _best_other(scores, index)
        for row in rows.start + np.flatnonzero(np.abs(lead) < _ROUNDING):
            exact = row_scores(queries[query_index[row]], candidates[candidate_index[row]])
            hit = rule_hits(exact[None], np.asarray(candidate_index[row])[None])
            official[row], strict[row] = hit[0][0], hit[1][0]
    return Hits(official, strict)


def rule_hits(scores: Floats, index: Ints) -> tuple[Bools, Bools]:
    """MMEB's rule and the strict one, over scores [B, K] of the candidates `index` [B, K].

    The official rule is `argmax == 0`, so a tie, or a row of NaN, goes to the positive. The strict
    rule wants a finite positive that leads every other candidate by more than `TIE`; the positive
    listed twice in a row does not tie with itself. Padding has index -1 and score -inf.
    """
    official = scores.argmax(axis=1) == 0
    with np.errstate(invalid="ignore"):
        leads = scores[:, 0] > _best_other(scores, index) + TIE
    return official, leads & np.isfinite(scores[:, 0])


def row_scores(query: Floats, candidates: Floats) -> Floats:
    """Cosines [K] of one query [D] in float64; equal candidates [K, D] get bit-equal scores."""
    return (candidates.astype(np.float64) * query.astype(np.float64)).sum(axis=1)


def chance_level(candidate_index: Sequence[Ints]) -> float:
    """Expected precision@1 of a blind guess: the mean of 1 / (candidates of the row)."""
    return float(np.mean([1.0 / len(row) for row in candidate_index]))


def _best_other(scores: Floats, index: Ints) -> Floats:
    """The best score [B] among candidates that are not the positive; NaN if one of them is NaN."""
    return np.where(index == index[:, :1], -np.inf, scores).max(axis=1)


def _row_blocks(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _pad(rows: Sequence[Ints]) -> Ints:
    """Ragged index rows as one array [B, K], filled up with -1."""
    padded = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def _some(bad: Bools) -> str:
    first = int(bad.argmax())
    return f"{int(bad.sum())} of {len(bad)} embeddings (first: number {first}) have"
