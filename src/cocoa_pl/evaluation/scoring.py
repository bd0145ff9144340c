"""Hits of queries against each row's candidates, in blocks of bounded memory.

A peer's loop (CoCoA's and VLM2Vec's eval.py) looks up, stacks and normalises the K candidate
vectors of every row. Here a block of rows is either one matrix product with the distinct candidates
of the block, or reads each row's own candidates, whichever counts less.

Shapes: U unique queries, N unique candidates, Q rows, K candidates of a row (ragged), D dimensions.
In every row the first candidate is the positive.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from cocoa_pl.evaluation.metrics import Hits, row_hit, rule_hits
from cocoa_pl.evaluation.vectors import Floats, Ints, blocks, read, to_float32

# Numbers held at once of each kind (queries, candidates, scores): 64 MiB of float32.
BLOCK = 1 << 24
# Reading a vector takes as long as multiplying it by this many queries.
READ_COST = 12
# Numbers of rows' own vectors that are read together, and used while the processor caches them.
_READ, _CACHED = 1 << 20, 1 << 17
# A float32 product may differ by this much between two equal candidates.
_ROUNDING = 1e-5


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
        vectors = np.asarray(candidates[flat[part]])
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
