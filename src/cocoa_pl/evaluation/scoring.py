"""Precision@1 of rows by MMEB's rule and a strict one, in blocks of bounded memory.

A peer's loop (CoCoA's and VLM2Vec's eval.py) looks up, stacks and normalises the K candidate
vectors of every row. Here it is one matrix product of a block of rows with its distinct candidates.

Shapes: U unique queries, N unique candidates, Q rows, B rows of a block, K candidates of a row
(ragged), D dimensions. In every row the first candidate is the positive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cocoa_pl.errors import UserError

Floats = NDArray[np.floating]  # vectors are float16 or float32, and computed with as float32
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

# Embeddings normalised in bfloat16 miss unit length by up to about 0.004.
UNIT_TOLERANCE = 1e-2
# Unit vectors closer than this have a cosine above 1 - 5e-7, which float32 cannot tell from 1.
COLLAPSE_DISTANCE = 1e-3
# Cosines of float32 unit vectors carry no information below this.
TIE = 1e-6
# Components of embeddings that are checked at once: 16 MiB of float32.
_CHECKED = 1 << 22
# Rows that are scored together. More of them read shared candidates less often; fewer compute less
# where candidates are not shared.
ROWS = 128
# Components of candidates that are float32 at once: 64 MiB.
BLOCK = 1 << 24
# A float32 product may differ by this much between two equal candidates.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Hits:
    """Which rows found their positive, bool [Q], and by how much.

    Attributes:
        positive: [Q] cosine of query and positive.
        hardest: [Q] the best cosine among the other candidates; -inf if there are none.
    """

    official: Bools
    strict: Bools
    positive: Floats
    hardest: Floats


def score_rows(
    queries: Floats,
    candidates: Floats,
    *,
    query_index: Ints,
    candidate_index: Sequence[Ints],
) -> Hits:
    """Score every row's query against that row's own candidates by cosine.

    Args:
        queries: [U, D] and candidates: [N, D], unit length, float32 or float16, each unique item
            once.
        query_index: [Q] row -> query.
        candidate_index: per row the indices [K] of its candidates, K may differ from row to row.
    """
    official = np.zeros(len(query_index), dtype=bool)
    strict = np.zeros(len(query_index), dtype=bool)
    positive, hardest = np.empty((2, len(query_index)), np.float32)
    place = np.empty(len(candidates), np.int32)  # of a candidate among the block's distinct ones
    for part in blocks(len(query_index), ROWS):
        rows = np.arange(part.start, part.stop)
        flat = np.concatenate([candidate_index[row] for row in rows])
        lengths = np.array([len(candidate_index[row]) for row in rows])
        starts = lengths.cumsum() - lengths
        needed = np.zeros(len(candidates), dtype=bool)
        needed[flat] = True
        distinct = np.flatnonzero(needed)
        place[distinct] = np.arange(len(distinct))
        scores = np.empty((len(rows), len(distinct)), np.float32)
        own_queries = to_float32(queries[query_index[rows]])
        with np.errstate(invalid="ignore", over="ignore"):  # NaN is judged by the rules
            for some in blocks(len(distinct), BLOCK // queries.shape[1]):
                scores[:, some] = own_queries @ read(candidates, distinct[some]).T
            of_row = scores[np.repeat(np.arange(len(rows)), lengths), place[flat]]
            # The positive's second mention in a row is no other candidate.
            is_other = flat != np.repeat(flat[starts], lengths)
            first = of_row[starts]
            other = np.maximum.reduceat(np.where(is_other, of_row, -np.inf), starts)
            official[rows], strict[rows] = rule_hits(first, other)
            positive[rows], hardest[rows] = first, other
            # A product rounds equal candidates differently: settle close rows one by one.
            for row in rows[np.abs(first - other) < _ROUNDING]:
                index = candidate_index[row]
                exact = row_scores(queries[query_index[row]], candidates, index)
                best_other = np.max(exact[index != index[0]], initial=-np.inf)
                (official[row],), (strict[row],) = rule_hits(exact[:1], best_other[None])
    return Hits(official, strict, positive, hardest)


def check_embeddings(embeddings: Floats, *, name: str) -> None:
    """Refuse embeddings [N, D] that would make a score meaningless; `name` says whose they are.

    A NaN or a constant vector makes all candidates tie, and ties count for the positive: unchecked,
    a broken model scores 100 %.

    Raises:
        UserError: on NaN or inf, rows that are not of unit length, or N > 1 rows all alike.
    """
    length = np.empty(len(embeddings))
    farthest = 0.0  # squared distance from the first one
    first = read(embeddings, slice(0, 1))
    with np.errstate(invalid="ignore", over="ignore"):
        for part in blocks(len(embeddings), _CHECKED // embeddings.shape[1]):
            some = read(embeddings, part)
            length[part] = np.sqrt(np.einsum("nd,nd->n", some, some, dtype=np.float64))
            apart = some - first
            farthest = max(farthest, float(np.einsum("nd,nd->n", apart, apart).max()))
    finite = np.isfinite(length)  # a sum of squares of float32 numbers is finite in float64
    if not finite.all():
        raise UserError(
            f"{name}: {_some(~finite)} NaN or inf; "
            "check the checkpoint, or evaluate in a wider precision (float32)"
        )
    unit = np.abs(length - 1.0) <= UNIT_TOLERANCE
    if not unit.all():
        worst = length[np.abs(length - 1.0).argmax()]
        raise UserError(
            f"{name}: {_some(~unit)} a length other than 1 (worst {worst:.4g}); "
            "normalise the embeddings before scoring"
        )
    if len(embeddings) > 1 and farthest < COLLAPSE_DISTANCE**2:
        raise UserError(
            f"{name}: all {len(embeddings)} embeddings are the same vector (collapsed); "
            "train on with a lower learning rate, or check that the inputs reach the model"
        )


def rule_hits(first: Floats, other: Floats) -> tuple[Bools, Bools]:
    """MMEB's rule and the strict one, over each row's positive [B] and its best other candidate.

    The official rule is `argmax == 0`, so a tie, or a positive that is NaN, goes to the positive.
    The strict rule wants a finite positive that leads every other candidate by more than `TIE`; the
    positive listed twice in a row does not tie with itself. `other` is NaN if one of them is, and
    -inf if there is none.
    """
    with np.errstate(invalid="ignore"):
        official = np.isnan(first) | (first >= other)
        return official, (first > other + TIE) & np.isfinite(first)


def row_scores(query: Floats, candidates: Floats, index: Ints) -> Floats:
    """Cosines [K] of one query [D] in float64; equal candidates get bit-equal scores."""
    wide = query.astype(np.float64)
    parts = [
        (candidates[index[part]].astype(np.float64) * wide).sum(axis=1)
        for part in blocks(len(index), BLOCK // len(query))
    ]
    return np.concatenate(parts)


def _some(bad: Bools) -> str:
    first = int(bad.argmax())
    return f"{int(bad.sum())} of {len(bad)} embeddings (first: number {first}) have"


def read(vectors: Floats, rows: slice | Ints) -> NDArray[np.float32]:
    """Some vectors as float32: [n, D]. Neighbours in their order are not copied one by one."""
    if not isinstance(rows, slice) and len(rows) and (np.diff(rows) == 1).all():
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
    return to_float32(vectors[rows])


def to_float32(vectors: Floats) -> NDArray[np.float32]:
    """As float32; float32 as it is, without a copy."""
    if vectors.dtype != np.float16:
        return vectors.astype(np.float32, copy=False)
    # numpy converts half precision one number at a time; torch by vector instructions.
    return torch.from_numpy(vectors).float().numpy()


def blocks(count: int, size: int) -> Iterator[slice]:
    """0..count in pieces of at most `size`, which is taken as 1 where it is less."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def evenly_spaced(length: int, *, count: int) -> Ints:
    """Up to `count` of `length` places, evenly spaced from the first to the last."""
    return np.linspace(0, length - 1, num=min(count, length)).round().astype(int)
