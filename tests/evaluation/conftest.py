"""A hand-made corpus: embeddings are written down per text, so every score is known beforehand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_pl.data.items import EvalSubset, Item
from cocoa_pl.evaluation.benchmark import score_subsets
from cocoa_pl.evaluation.results import Results
from cocoa_pl.evaluation.vectors import encode_once

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


@pytest.fixture
def evaluate(compass: Callable[[Sequence[Item]], np.ndarray]) -> Callable[..., Results]:
    """Scores of subsets whose texts `compass` encodes, unless something else shall."""

    def score(subsets: Sequence[EvalSubset], *, encode: Any = compass, **choices: Any) -> Results:
        given = {"benchmark": "digits", "checkpoint": "runs/1", **choices}
        return score_subsets(encode_once(encode, subsets), subsets, **given)

    return score


@pytest.fixture
def metrics_csv(tmp_path: Path) -> Path:
    """Two stages, a value that is not finite, and a metric that is no loss."""
    path = tmp_path / "metrics.csv"
    path.write_text(
        "stage,step,name,value\n"
        "warmup,0,train/loss_mntp,2.5\n"
        "warmup,1,train/loss_mntp,nan\n"
        "warmup,2,train/loss_mntp,1.5\n"
        "warmup,2,val/loss_mntp,1.75\n"
        "warmup,2,train/tokens_per_second,900\n"
        "contrast,0,train/loss,4.85\n"
        "contrast,1,train/loss,-0.5\n"
    )
    return path
