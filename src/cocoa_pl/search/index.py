"""An index of the images below a folder: their vectors, and the nearest ones to a query.

Floats are kept in the folder's `.cocoa`, one store for each model: what is new or has changed is
embedded, a killed run goes on, and what is gone is not found any more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Floats, blocks, read
from cocoa_pl.evaluation.store import FORMAT, VectorStore, embed_missing
from cocoa_pl.models.exported import digest_of_text
from cocoa_pl.search.folder import cache_keys, existing, image_files, items_of, unreadable

KEPT_IN = ".cocoa"
BLOCK = 1 << 14  # vectors that are float32 at once


@dataclass(frozen=True)
class Found:
    """An image and its cosine to the query.

    Attributes:
        number: of the file in the index.
        file: relative to the folder.
    """

    number: int
    file: Path
    score: float


@dataclass(frozen=True)
class Update:
    """What an update of the index did.

    Attributes:
        embedded: files that are new or have changed.
        unreadable: by file, why it is left out.
    """

    embedded: int
    unreadable: dict[Path, str]


class ImageIndex:
    """The images below a folder, ready to be searched once `update` has run.

    Args:
        folder: of images.
        kept_in: folder for vectors; None for `.cocoa` in the folder itself.
        threads: that read images.

    Raises:
        UserError: if the folder is none, or its vectors cannot be kept.
    """

    def __init__(
        self, folder: Path, embedder: Embedder, *, kept_in: Path | None, threads: int
    ) -> None:
        self.folder = existing(folder)
        self.embedder = embedder
        self.threads = threads
        identity = embedder.identity()
        exact = {n: v for n, v in identity.items() if n not in ("fingerprint", "tolerance")}
        model = digest_of_text(json.dumps([FORMAT, exact], sort_keys=True))[:16]
        self.store = VectorStore(
            (kept_in or self.folder / KEPT_IN) / model,
            identity=identity,
            dim=embedder.dim,
            dtype="float16",
        )
        self.files: list[Path] = []
        self._vectors: Any = np.empty((0, embedder.dim), np.float16)

    def update(self) -> Update:
        """Look at the folder, embed what is new or has changed, forget what is gone.

        Raises:
            UserError: if the folder holds no image that can be read.
        """
        files = image_files(self.folder)
        items = items_of(self.folder, files)
        keys = cache_keys(files, items)
        new = self.store.missing(keys)
        bad = unreadable([items[n] for n in new.tolist()], threads=self.threads)
        left_out = {files[new[place]]: text for place, text in bad.items()}
        good = np.setdiff1d(np.arange(len(files)), new[list(bad)])
        if not len(good):
            raise UserError(f"{self.folder} holds no image that can be read")
        embedded = embed_missing(
            self.store,
            [items[n] for n in good.tolist()],
            keys[good],
            lambda some: self.embedder.stream(some, threads=self.threads),
        )
        self.files = [files[n] for n in good.tolist()]
        self._vectors = self.store.vectors(keys[good])
        return Update(embedded, left_out)

    def search(self, query: NDArray[np.float32], top: int) -> list[Found]:
        """The images nearest to a unit vector [D], the best first."""
        numbers, scores = nearest(query, self._vectors, top)
        pairs = zip(numbers.tolist(), scores.tolist(), strict=True)
        return [Found(number, self.files[number], score) for number, score in pairs]


def nearest(
    query: NDArray[np.float32], vectors: Floats, top: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Numbers [K] and cosines [K] of the vectors nearest to a query, the best first; the first of
    equals comes first. K = min(top, N).

    Every vector is read: 200,000 of them take well under a second.

    Args:
        query: [D] and vectors: [N, D], of unit length.
    """
    scores = np.empty(len(vectors), np.float32)
    for part in blocks(len(vectors), BLOCK):
        scores[part] = read(vectors, part) @ query
    top = min(top, len(scores))
    order = np.argsort(-scores, kind="stable")[:top]
    return order, scores[order]
