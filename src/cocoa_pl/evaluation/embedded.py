"""A model and evaluation subsets in, the subsets' vectors out: in memory, or read from a store.

A store is filled by all processes of the job and scored by one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.data.items import Item
from cocoa_pl.distributed.collectives import all_objects, rank, world_size
from cocoa_pl.evaluation.benchmark import VectorsOf, encode_once
from cocoa_pl.evaluation.filling import Stream, distinct, fill
from cocoa_pl.evaluation.identities import Identities
from cocoa_pl.evaluation.store import StoredVectors, VectorStore

if TYPE_CHECKING:
    from cocoa_pl.data.items import EvalSubset


@dataclass(frozen=True)
class VectorSettings:
    """How the items of a benchmark are embedded, and where their vectors are.

    Attributes:
        batch_tokens: that go through the model together.
        threads: that read and encode ahead of it.
        store: folder that keeps the vectors; None has them in memory, in float32.
        store_dtype: of the vectors in it.
    """

    batch_tokens: int = 8192
    threads: int = 4
    store: Path | None = None
    store_dtype: str = "float16"


IN_MEMORY = VectorSettings()


class Model(Protocol):
    """What an `Embedder` offers; see there."""

    @property
    def dim(self) -> int: ...

    def identity(self) -> dict[str, Any]: ...

    def encode(
        self, items: Sequence[Item], *, batch_tokens: int, threads: int
    ) -> NDArray[np.float32]: ...

    def stream(
        self, items: Sequence[Item], *, batch_tokens: int, threads: int
    ) -> Generator[tuple[NDArray[np.intp], NDArray[np.float32]]]: ...


def embedded(model: Model, subsets: Sequence[EvalSubset], settings: VectorSettings) -> VectorsOf:
    """Where the subsets' vectors come from; a store has been filled by all processes by then."""
    given: Any = {"batch_tokens": settings.batch_tokens, "threads": settings.threads}
    if settings.store is None:
        return encode_once(partial(model.encode, **given), subsets)
    store = VectorStore(
        settings.store, identity=model.identity(), dim=model.dim, dtype=settings.store_dtype
    )
    stored = StoredSubsets(store, subsets)
    stored.fill(partial(model.stream, **given), rank=rank(), world_size=world_size())
    all_objects("done")  # nobody scores before everybody has filled his share
    store.reload()
    return stored.vectors_of


class StoredSubsets:
    """The items of subsets in a store; image files are looked at once, when this is made."""

    def __init__(self, store: VectorStore, subsets: Sequence[EvalSubset]) -> None:
        self.store = store
        self.items = [item for subset in subsets for item in (*subset.queries, *subset.candidates)]
        self.identities = Identities.of(self.items)
        self._sizes = [(len(subset.queries), len(subset.candidates)) for subset in subsets]

    def fill(self, stream: Stream, *, rank: int, world_size: int) -> int:
        """Embed this process's share of what is missing (`filling.fill`)."""
        items, identities = distinct(self.items, self.identities)
        return fill(self.store, items, identities, stream, rank=rank, world_size=world_size)

    def vectors_of(self, number: int) -> tuple[StoredVectors, StoredVectors]:
        """A subset's query and candidate vectors, once all processes have filled the store."""
        start = sum(sum(sizes) for sizes in self._sizes[:number])
        queries, candidates = self._sizes[number]
        middle, end = start + queries, start + queries + candidates
        return (
            self.store.vectors(self.identities[start:middle]),
            self.store.vectors(self.identities[middle:end]),
        )
