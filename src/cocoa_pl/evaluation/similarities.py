"""Histograms of cosines with positives and with hardest negatives.

How far they lie apart says whether the right one wins by a hair or clearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cocoa_pl.evaluation.curves import HEIGHT, WIDTH
from cocoa_pl.evaluation.scoring import Hits
from cocoa_pl.evaluation.vectors import Floats

EDGES = tuple(round(-1 + 0.05 * number, 2) for number in range(41))


@dataclass(frozen=True)
class Similarities:
    """Rows of each bin of `EDGES`, by the cosine of their query with its positive, and with the
    nearest of its other candidates.
    """

    positive: tuple[int, ...]
    hardest: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Its part of a subset in results.json; bins are of 0.05 from -1 to 1."""
        return {
            "positive_similarities": list(self.positive),
            "hardest_negative_similarities": list(self.hardest),
        }


class Bar(NamedTuple):
    """In the units of the drawing, `WIDTH` x `HEIGHT`."""

    left: float
    width: float
    height: float


@dataclass(frozen=True)
class Histogram:
    """Similarities of positives and of hardest negatives, as bars between two cosines."""

    positive: list[Bar]
    hardest: list[Bar]
    low: float
    high: float


def counted(hits: Hits) -> Similarities:
    """Histograms of a subset; a row without other candidates is in the first alone."""
    return Similarities(_bins(hits.positive), _bins(hits.hardest))


def histogram(similarities: Similarities) -> Histogram:
    """Bars over the bins between the first and the last that hold a row, on one scale."""
    both = np.array([similarities.positive, similarities.hardest])
    filled = np.flatnonzero(both.any(axis=0))
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, len(both[0]) - 1)
    both = both[:, first : last + 1]
    width = WIDTH / both.shape[1]
    bars = [
        [
            Bar(round(place * width, 2), round(width, 2), round(HEIGHT * float(share), 2))
            for place, share in enumerate(counts / max(1, both.max()))
            if share
        ]
        for counts in both
    ]
    return Histogram(bars[0], bars[1], low=EDGES[first], high=EDGES[last + 1])


def _bins(values: Floats) -> tuple[int, ...]:
    finite = values[np.isfinite(values)]
    counts = np.histogram(np.clip(finite, -1, 1), bins=np.array(EDGES))[0]  # rounding goes past 1
    return tuple(int(count) for count in counts)
