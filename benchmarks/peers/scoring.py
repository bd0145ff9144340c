"""Hits of one query at a time, as peers evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Key = tuple[str, str]  # text, path of the image
Vector = NDArray[np.float32]


def hits_row_by_row(
    queries: Sequence[Key],
    rows: Sequence[Sequence[Key]],
    known_queries: Mapping[Key, Vector],
    known_candidates: Mapping[Key, Vector],
) -> list[bool]:
    """Whether the first candidate of each row is nearest, in the manner of VLM2Vec's eval.py.

    Embeddings are looked up, stacked, divided by their lengths although they are unit, multiplied.
    """
    found = []
    for query, candidates in zip(queries, rows, strict=True):
        vector = known_queries[query]
        stacked = np.stack([known_candidates[candidate] for candidate in candidates], axis=0)
        lengths = np.linalg.norm(stacked, axis=1) * np.linalg.norm(vector)
        scores = np.dot(stacked, vector) / lengths
        found.append(bool(np.argmax(scores) == 0))
    return found
