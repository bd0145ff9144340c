"""Cosines of positives and of hardest negatives in, histograms of both out.

How far they lie apart says whether the right one wins by a hair or clearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cocoa_pl.evaluation.metrics import Hits
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


def counted(hits: Hits) -> Similarities:
    """Histograms of a subset; a row without other candidates is in the first alone."""
    return Similarities(_bins(hits.positive), _bins(hits.hardest))


def _bins(values: Floats) -> tuple[int, ...]:
    finite = values[np.isfinite(values)]
    counts = np.histogram(np.clip(finite, -1, 1), bins=np.array(EDGES))[0]  # rounding goes past 1
    return tuple(int(count) for count in counts)
