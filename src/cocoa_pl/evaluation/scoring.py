"""Precision@1 of rows by MMEB's rule and a strict one, in blocks of bounded memory.

A peer's loop (CoCoA's and VLM2Vec's eval.py) looks up, stacks and normalises the K candidate
vectors of every row. Here a block of rows is either one matrix product with the distinct candidates
of the block, or reads each row's own candidates, whichever counts less.

Shapes: U unique queries, N unique candidates, Q rows, B rows of a block, K candidates of a row
(ragged), D dimensions. In every row the first candidate is the positive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.vectors import Floats, Ints, blocks, read, to_float32

Bools = NDArray[np.bool_]

# Embeddings normalised in bfloat16 miss unit length by up to about 0.004.
UNIT_TOLERANCE = 1e-2
# Unit vectors closer than this have a cosine above 1 - 5e-7, which float32 cannot tell from 1.
COLLAPSE_DISTANCE = 1e-3
# Cosines of float32 unit vectors carry no information below this.
TIE = 1e-6
# Components of embeddings that are checked at once: 16 MiB of float32.
_CHECKED = 1 << 22
# Numbers held at once of each kind (queries, candidates, scores): 64 MiB of float32.
BLOCK = 1 << 24
# Reading a vector takes as long as multiplying it by this many queries.
READ_COST = 12
# Numbers of rows' own vectors that are read together, and used while the processor caches them.
_READ, _CACHED = 1 << 20, 1 << 17
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

    @property
    def num_without_choice(self) -> int:
        """Rows whose positive is the only candidate: hits, whatever the model says."""
        return int(np.isneginf(self.hardest).sum())

    @property
    def precision_at_1(self) -> float:
        return float(self.official.mean())

    @property
    def precision_at_1_strict(self) -> float:
        return float(self.strict.mean())


def score_rows(
    queries: Floats,
    candidates: Floats,
    *,
    query_index: Ints,
    candidate_index: Sequence[Ints],
    block: int = BLOCK,
) -> Hits:
    """Score every row's query against that row's own candidates by cosine.

    Args:
        queries: [U, D] and candidates: [N, D], unit length, each unique item encoded once; float32,
            or float16, which is to_float32 where it is read.
        query_index: [Q] row -> query.
        candidate_index: per row the indices [K] of its candidates, K may differ from row to row.
        block: numbers held at once of each kind: queries, candidates, scores. Memory is a few
            times as many float32 and O(N + Q); only a row alone may need more, for its K scores.
    """
    official = np.zeros(len(query_index), dtype=bool)
    strict = np.zeros(len(query_index), dtype=bool)
    positive, hardest = np.empty((2, len(query_index)), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN is judged by the rules
        for rows, first, other in _leads(queries, candidates, query_index, candidate_index, block):
            official[rows], strict[rows] = rule_hits(first, other)
            positive[rows], hardest[rows] = first, other
            # A product rounds equal candidates differently: settle close rows one by one.
            for row in rows[np.abs(first - other) < _ROUNDING]:
                official[row], strict[row] = row_hit(
                    queries[query_index[[row]]][0], candidates, candidate_index[row], block=block
                )
    return Hits(official, strict, positive, hardest)


def _leads(
    queries: Floats,
    candidates: Floats,
    query_index: Ints,
    candidate_index: Sequence[Ints],
    block: int,
) -> Iterator[tuple[Ints, Floats, Floats]]:
    """Rows [B], and of each its positive's score and the best among its other candidates."""
    width = queries.shape[1]
    ranks = np.empty(len(candidates), np.int32)
    for rows, lists in _row_blocks(candidate_index, width=width, block=block):
        block_queries = read(queries, query_index[rows])
        flat = np.concatenate(lists)
        lengths = np.array([len(one) for one in lists])
        distinct = _distinct(flat, ranks)
        if product_counts_less(len(rows), pairs=len(flat), distinct=len(distinct)):
            scores = _product(block_queries, candidates, distinct, block=block)
            places = np.repeat(np.arange(len(rows)) * len(distinct), lengths) + ranks[flat]
            scores = scores.reshape(-1)[places]
        else:
            scores = _own_scores(block_queries, candidates, flat, lengths, block=block)
        yield rows, *_best(scores, flat, lengths)


def product_counts_less(rows: int, *, pairs: int, distinct: int) -> bool:
    """Whether scoring these rows with all their distinct candidates takes less than each with its
    own: multiplications of vectors, and vectors to be read, at `READ_COST` multiplications each.
    """
    return (rows + READ_COST) * distinct <= (1 + READ_COST) * pairs


def _row_blocks(
    candidate_index: Sequence[Ints], *, width: int, block: int
) -> Iterator[tuple[Ints, list[Ints]]]:
    """Consecutive rows with their lists, at least one row at a time.

    The product is taken only where rows x distinct candidates is below `READ_COST` x the rows'
    candidates, so this many candidates keep its scores within `block`.
    """
    lists: list[Ints] = []
    start, pairs = 0, 0
    for number, row in enumerate(candidate_index):
        one = np.asarray(row)
        if lists and (pairs + len(one) > block // READ_COST or (len(lists) + 1) * width > block):
            yield np.arange(start, number), lists
            start, lists, pairs = number, [], 0
        lists.append(one)
        pairs += len(one)
    if lists:
        yield np.arange(start, start + len(lists)), lists


def _distinct(flat: Ints, ranks: Ints) -> Ints:
    """The distinct numbers of `flat`, sorted; writes the place of each of them into `ranks`."""
    seen = np.zeros(len(ranks), bool)
    seen[flat] = True
    distinct = np.flatnonzero(seen)
    ranks[distinct] = np.arange(len(distinct), dtype=ranks.dtype)
    return distinct


def _product(queries: Floats, candidates: Floats, distinct: Ints, *, block: int) -> Floats:
    """Scores of all queries [B, D] with all of these candidates: [B, M]."""
    scores = np.empty((len(queries), len(distinct)), queries.dtype)
    for part in blocks(len(distinct), block // queries.shape[1]):
        scores[:, part] = queries @ read(candidates, distinct[part]).T
    return scores


def _own_scores(
    queries: Floats, candidates: Floats, flat: Ints, lengths: Ints, *, block: int
) -> Floats:
    """Scores of each query [B, D] with its own candidates only: [sum of K]."""
    width = queries.shape[1]
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    scores = np.empty(len(flat), queries.dtype)
    for part in blocks(len(flat), min(_READ, block) // width):
        vectors = candidates[flat[part]]
        for piece in blocks(len(vectors), _CACHED // width):
            wide = to_float32(vectors[piece])
            rows = row_of[part][piece]
            cuts = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
            for start, stop in pairwise(cuts):
                place = part.start + piece.start + start
                here = scores[place : place + stop - start]
                np.dot(wide[start:stop], queries[rows[start]], out=here)
    return scores


def _best(scores: Floats, flat: Ints, lengths: Ints) -> tuple[Floats, Floats]:
    """Of each row the positive's score and the best of the others; no others are -inf.

    A candidate named twice is one: the positive's second mention is no other.
    """
    starts = lengths.cumsum() - lengths
    is_other = flat != np.repeat(flat[starts], lengths)
    others = np.where(is_other, scores, -np.inf)
    return scores[starts], np.maximum.reduceat(others, starts)


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


def row_hit(query: Floats, candidates: Floats, index: Ints, *, block: int) -> tuple[bool, bool]:
    """Both rules for one row, exactly: its query [D], and the candidates `index` [K] names."""
    scores = row_scores(query, candidates, index, block=block)
    others = scores[np.asarray(index) != index[0]]
    official, strict = rule_hits(scores[:1], np.max(others, initial=-np.inf)[None])
    return bool(official[0]), bool(strict[0])


def row_scores(query: Floats, candidates: Floats, index: Ints, *, block: int) -> Floats:
    """Cosines [K] of one query [D] in float64; equal candidates get bit-equal scores.

    Args:
        block: components read at once.
    """
    wide = query.astype(np.float64)
    parts = [
        (candidates[index[part]].astype(np.float64) * wide).sum(axis=1)
        for part in blocks(len(index), block // len(query))
    ]
    return np.concatenate(parts)


def chance_level(candidate_index: Sequence[Ints]) -> float:
    """Expected precision@1 of a blind guess: the mean of 1 / (candidates of the row)."""
    return float(np.mean([1.0 / len(row) for row in candidate_index]))


def _some(bad: Bools) -> str:
    first = int(bad.argmax())
    return f"{int(bad.sum())} of {len(bad)} embeddings (first: number {first}) have"
