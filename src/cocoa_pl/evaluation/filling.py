"""Items and a model's stream of vectors in, a store that holds them all out.

Every so many vectors, or minutes, become a shard; so much is what a killed run has to do again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.data.items import Item
from cocoa_pl.evaluation.identities import Identities
from cocoa_pl.evaluation.store import VectorStore
from cocoa_pl.evaluation.vectors import Floats

log = logging.getLogger(__name__)

SHARD_VECTORS = 1 << 15
SHARD_SECONDS = 300.0

# Items -> their places and vectors, batch after batch (`Embedder.stream`).
Stream = Callable[[Sequence[Item]], Generator[tuple[NDArray[np.intp], Floats]]]


def distinct(items: Sequence[Item], identities: Identities) -> tuple[list[Item], Identities]:
    """Each item once, in the order of first occurrence."""
    first = np.sort(np.unique(identities.both, return_index=True)[1])
    return [items[place] for place in first.tolist()], identities[first]


def fill(
    store: VectorStore,
    items: Sequence[Item],
    identities: Identities,
    stream: Stream,
    *,
    rank: int,
    world_size: int,
) -> int:
    """Embed those distinct items that the store lacks and that are this process's share.

    A share follows from the item's key alone: no two processes embed the same item, whatever each
    of them has seen of the others' shards, and a run may go on with another number of processes.

    Returns:
        How many were embedded.

    Raises:
        UserError: for an item that cannot be embedded; what was finished before it is kept.
    """
    mine = np.flatnonzero(identities.keys % world_size == rank)
    todo = mine[store.find(identities[mine]) < 0]
    log.info(
        "%s of %s vectors are in %s; embedding %s%s",
        f"{len(mine) - len(todo):,}",
        f"{len(mine):,}",
        store.folder,
        f"{len(todo):,}",
        f" in process {rank + 1} of {world_size}" if world_size > 1 else "",
    )
    if changed := store.count_changed(identities[todo]):
        log.info("%s of them because an image file has changed", f"{changed:,}")
    writer = _Writer(store, identities[todo])
    parts = stream([items[place] for place in todo.tolist()])
    with closing(parts):
        try:
            for places, vectors in parts:
                writer.add(places, vectors)
        finally:  # what is finished is kept, whatever ended the rest
            writer.flush()
    return len(todo)


class _Writer:
    """Collects vectors until they make a shard."""

    def __init__(self, store: VectorStore, identities: Identities) -> None:
        self.store = store
        self.identities = identities
        self._forget()

    def add(self, places: NDArray[np.intp], vectors: Floats) -> None:
        self._places.append(places)
        self._vectors.append(vectors.astype(self.store.dtype))
        self._count += len(places)
        if self._count >= SHARD_VECTORS or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._count:
            identities = self.identities[np.concatenate(self._places)]
            self.store.write(identities, np.concatenate(self._vectors))
        self._forget()

    def _forget(self) -> None:
        self._places: list[NDArray[np.intp]] = []
        self._vectors: list[Floats] = []
        self._count = 0
        self._since = time.monotonic()
