"""A hand-made corpus: embeddings are written down per text, so every score is known beforehand."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cocoa_pl.data.items import EvalSubset, Item

Rows = Sequence[tuple[str, Sequence[str]]]  # query, candidates with the positive first


@pytest.fixture
def make_subset() -> Callable[..., EvalSubset]:
    def make(
        name: str, rows: Rows, *, group: str = "retrieval", in_distribution: bool = True
    ) -> EvalSubset:
        queries = list(dict.fromkeys(query for query, _ in rows))
        candidates = list(dict.fromkeys(text for _, texts in rows for text in texts))
        return EvalSubset(
            name=name,
            group=group,
            in_distribution=in_distribution,
            queries=[Item(text) for text in queries],
            candidates=[Item(text) for text in candidates],
            query_index=np.array([queries.index(query) for query, _ in rows], dtype=np.int32),
            candidate_index=[
                np.array([candidates.index(text) for text in texts], dtype=np.int32)
                for _, texts in rows
            ],
            row_ids=[f"{name} row {number}" for number in range(len(rows))],
        )

    return make


@pytest.fixture
def compass() -> Callable[[Sequence[Item]], np.ndarray]:
    """Encodes a text by the angle at its end, in degrees: `"north 90"` is (0, 1)."""

    def encode(items: Sequence[Item]) -> np.ndarray:
        angles = np.radians([float(item.text.split()[-1]) for item in items])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    return encode
