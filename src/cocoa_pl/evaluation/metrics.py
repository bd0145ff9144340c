"""Precision@1 by MMEB's rule and a strict one, and the embeddings that are refused.

Shapes: N embeddings, Q rows, B rows of a block, K candidates of a row (ragged), D dimensions. In
every row the first candidate is the positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.vectors import Floats, Ints, blocks, read

Bools = NDArray[np.bool_]

# Embeddings normalised in bfloat16 miss unit length by up to about 0.004.
UNIT_TOLERANCE = 1e-2
# Unit vectors closer than this have a cosine above 1 - 5e-7, which float32 cannot tell from 1.
COLLAPSE_DISTANCE = 1e-3
# Cosines of float32 unit vectors carry no information below this.
TIE = 1e-6
# Components of embeddings that are checked at once: 16 MiB of float32.
_BLOCK = 1 << 22


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
        for part in blocks(len(embeddings), _BLOCK // embeddings.shape[1]):
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
        (np.asarray(candidates[index[part]]).astype(np.float64) * wide).sum(axis=1)
        for part in blocks(len(index), block // len(query))
    ]
    return np.concatenate(parts)


def chance_level(candidate_index: Sequence[Ints]) -> float:
    """Expected precision@1 of a blind guess: the mean of 1 / (candidates of the row)."""
    return float(np.mean([1.0 / len(row) for row in candidate_index]))


def _some(bad: Bools) -> str:
    first = int(bad.argmax())
    return f"{int(bad.sum())} of {len(bad)} embeddings (first: number {first}) have"
