"""Vectors of evaluation subsets: in memory, or in a store that all processes of a job fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_pl.data.items import EvalSubset
from cocoa_pl.distributed.collectives import all_objects, rank, world_size
from cocoa_pl.embedder import Embedder
from cocoa_pl.evaluation.benchmark import VectorsOf, encode_once
from cocoa_pl.evaluation.store import VectorStore, cache_keys, embed_missing


@dataclass(frozen=True)
class VectorSettings:
    """How the items of a benchmark are embedded, and where their vectors are.

    Attributes:
        batch_tokens: that go through the model together.
        threads: that read and tokenize ahead of it.
        store: folder that keeps the vectors; None has them in memory, in float32.
        store_dtype: of the vectors in it.
    """

    batch_tokens: int = 8192
    threads: int = 4
    store: Path | None = None
    store_dtype: str = "float16"


IN_MEMORY = VectorSettings()


def embedded(model: Embedder, subsets: Sequence[EvalSubset], settings: VectorSettings) -> VectorsOf:
    """Where the subsets' vectors come from; a store has been filled by all processes by then."""
    given: Any = {"batch_tokens": settings.batch_tokens, "threads": settings.threads}
    if settings.store is None:
        return encode_once(partial(model.encode, **given), subsets)
    store = VectorStore(
        settings.store, identity=model.identity(), dim=model.dim, dtype=settings.store_dtype
    )
    keys = [(cache_keys(subset.queries), cache_keys(subset.candidates)) for subset in subsets]
    for subset, both in zip(subsets, keys, strict=True):
        embed_missing(
            store,
            [*subset.queries, *subset.candidates],
            np.concatenate(both),
            partial(model.stream, **given),
            rank=rank(),
            world_size=world_size(),
        )
    all_objects("done")  # scoring waits until every process has embedded its share
    store.reload()
    return lambda number: (store.vectors(keys[number][0]), store.vectors(keys[number][1]))
