"""Bootstrap intervals of scores over queries (Efron 1979).

A bootstrap over queries (Efron 1979). Rows score 0 or 1, so how many of a resample's rows are hits
is binomial, and no resample has to be drawn row by row. Which subsets a benchmark has is not drawn:
an interval says nothing of other data sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]


def resampled(score: float, count: int, *, name: str) -> NDArray[np.float64]:
    """(RESAMPLES) scores of as many rows drawn with replacement.

    Args:
        name: of the subset; the draws follow from it, so that a subset has the same interval in
            any choice of them.
    """
    seed = int.from_bytes(name.encode(), "little")
    drawn = np.random.default_rng(seed).binomial(count, score, size=RESAMPLES)
    return drawn / count


def interval(parts: Sequence[NDArray[np.float64]]) -> Interval:
    """Of the unweighted mean over subsets whose resamples these are."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(parts, axis=0), [tail, 1 - tail])
    return float(low), float(high)
