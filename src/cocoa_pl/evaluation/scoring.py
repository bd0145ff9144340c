"""The rank of every row's positive among the row's own candidates, and metrics of ranks.

A peer's loop (CoCoA's and VLM2Vec's eval.py) looks up, stacks and normalises the K candidate
vectors of every row. Here it is one matrix product of a block of rows with its distinct candidates.

Shapes: U unique queries, N unique candidates, Q rows, B rows of a block with C distinct candidates,
K candidates of a row (ragged), D dimensions. In every row the first candidate is the positive.
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
# A float32 product may differ by this much between two equal candidates.
ROUNDING = 1e-5
# Rows that are scored together. More of them read shared candidates less often; fewer compute less
# where candidates are not shared.
ROWS = 128
# Components of vectors that are float32 at once: 64 MiB.
BLOCK = 1 << 24
CUTS = (1, 5, 10)  # the k of recall@k and nDCG@k
BINS = 40  # of cosines from -1 to 1


@dataclass(frozen=True)
class Ranks:
    """Where each row ranks its positive among its distinct candidates, 1 is the best; all are [Q].

    Attributes:
        official: 1 and the candidates that score higher: ties go to the positive, as in MMEB.
        strict: 1 and the candidates that the positive does not lead by more than `TIE`.
        positive: cosine of query and positive.
        hardest: the best cosine among the other candidates; -inf if there are none.
    """

    official: Ints
    strict: Ints
    positive: Floats
    hardest: Floats


def rank_positives(
    queries: Floats, candidates: Floats, *, query_index: Ints, candidate_index: Sequence[Ints]
) -> Ranks:
    """Rank every row's positive by cosine; a candidate that a row lists twice counts once.

    Args:
        queries: [U, D] and candidates: [N, D], unit length, float32 or float16, each unique item
            once.
        query_index: [Q] row -> query.
        candidate_index: per row the indices [K] of its candidates, K may differ from row to row.
    """
    official, strict = np.ones((2, len(query_index)), np.int64)
    positive, hardest = np.empty((2, len(query_index)), np.float32)
    at_once = max(1, BLOCK // queries.shape[1])  # vectors
    for block in blocks(len(query_index), ROWS):
        of_row = [candidate_index[row] for row in range(block.start, block.stop)]
        lengths = np.array([len(index) for index in of_row])
        rows = np.arange(len(of_row))
        listed = np.concatenate(of_row)
        is_listed = np.zeros(len(candidates), dtype=bool)
        is_listed[listed] = True
        distinct, column = np.flatnonzero(is_listed), is_listed.cumsum()[listed] - 1
        own = column[lengths.cumsum() - lengths]  # (B,) columns of the positives
        is_other = np.zeros((len(rows), len(distinct)), dtype=bool)  # (B, C)
        is_other[np.repeat(rows, lengths), column] = True
        is_other[rows, own] = False
        asked = to_float32(queries[query_index[block]])  # (B, D)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN is judged by the rules
            parts = (candidates[distinct[some]] for some in blocks(len(distinct), at_once))
            scores = np.concatenate([asked @ to_float32(part).T for part in parts], axis=1)
            first = scores[rows, own]  # (B,)
            ahead, level = not_below(scores, first[:, None])  # (B, C)
            # A product rounds equal candidates differently: close ones are settled in float64,
            # where equal vectors have bit-equal sums.
            close = np.argwhere(is_other & (np.abs(scores - first[:, None]) < ROUNDING))
            for some in blocks(len(close), at_once):
                row, other = close[some].T
                query = asked[row].astype(np.float64)
                exact = [
                    (candidates[distinct[places]].astype(np.float64) * query).sum(axis=1)
                    for places in (other, own[row])
                ]
                ahead[row, other], level[row, other] = not_below(*exact)
            hardest[block] = np.where(is_other, scores, -np.inf).max(axis=1)
        positive[block] = first
        official[block] += (ahead & is_other).sum(axis=1)
        strict[block] += (level & is_other).sum(axis=1) + ~np.isfinite(first)
    return Ranks(official, strict, positive, hardest)


def not_below(scores: Floats, positive: Floats) -> tuple[Bools, Bools]:
    """Whether candidates stand before the positive, by MMEB's rule and by the strict one.

    MMEB's is `argmax == 0`: only a higher score, or one that is NaN, stands before the positive,
    and nothing before a positive that is NaN. The strict rule wants a finite positive that leads
    by more than `TIE`.
    """
    official = ~(np.isnan(positive) | (scores <= positive))
    return official, ~((positive > scores + TIE) & np.isfinite(positive))


def metrics(official: Ints, strict: Ints) -> dict[str, float]:
    """Precision@1, recall@k and nDCG@k of ranks [Q] by both rules, by their names in results.json.

    A row has one right answer: recall is 1 where its rank is at most k, nDCG (Jarvelin and
    Kekalainen 2002) 1 / log2(1 + rank) there; both are 0 elsewhere.
    """
    found = {}
    for suffix, ranks in (("", official), ("_strict", strict)):
        found[f"precision_at_1{suffix}"] = float((ranks == 1).mean())
        gains = 1 / np.log2(1 + ranks)
        for k in CUTS:
            found[f"recall_at_{k}{suffix}"] = float((ranks <= k).mean())
            found[f"ndcg_at_{k}{suffix}"] = float(np.where(ranks <= k, gains, 0).mean())
    return found


def binned(cosines: Floats) -> tuple[int, ...]:
    """Rows of each of `BINS` bins; what is not finite is in none."""
    inside = np.clip(cosines[np.isfinite(cosines)], -1, 1)  # rounding goes past 1
    return tuple(np.histogram(inside, BINS, (-1, 1))[0].tolist())


def check_embeddings(embeddings: Floats, *, name: str) -> None:
    """Refuse embeddings [N, D] that would make a score meaningless; `name` says whose they are.

    A NaN or a constant vector makes all candidates tie, and ties count for the positive: unchecked,
    a broken model scores 100 %.

    Raises:
        UserError: on NaN or inf, rows that are not of unit length, or N > 1 rows all alike.
    """
    length = np.empty(len(embeddings))
    farthest = 0.0  # squared distance from the first one
    first = to_float32(embeddings[:1])
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks(len(embeddings), BLOCK // embeddings.shape[1]):
            some = to_float32(embeddings[block])
            length[block] = np.sqrt(np.einsum("nd,nd->n", some, some, dtype=np.float64))
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


def _some(bad: Bools) -> str:
    first = int(bad.argmax())
    return f"{int(bad.sum())} of {len(bad)} embeddings (first: number {first}) have"


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
