"""An index of the images below a folder: their vectors, and the nearest ones to a query.

Floats are kept in the folder's `.cocoa`, one store for each model: what is new or has changed is
embedded, a killed run goes on, and what is gone is not found any more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.data.images import open_image
from cocoa_pl.data.items import IMAGE_SLOT, Item, as_key
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Floats, blocks, read
from cocoa_pl.evaluation.store import FORMAT, Keys, VectorStore, embed_missing, file_state
from cocoa_pl.models.exported import digest_of_text

KEPT_IN = ".cocoa"
BLOCK = 1 << 14  # vectors that are float32 at once
SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
)


class Found(NamedTuple):
    """An image and its cosine to the query.

    Attributes:
        number: of the file in the index.
        file: relative to the folder.
    """

    number: int
    file: Path
    score: float


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

    def update(self) -> tuple[int, dict[Path, str]]:
        """Look at the folder, embed what is new or has changed, forget what is gone.

        Returns:
            How many files are new or have changed; and those left out, with the reason.

        Raises:
            UserError: if the folder holds no image that can be read.
        """
        files = image_files(self.folder)
        items = [Item(IMAGE_SLOT, (self.folder / file,)) for file in files]
        keys = cache_keys(files, items)
        new = self.store.missing(keys).tolist()
        with ThreadPoolExecutor(max(self.threads, 1)) as pool:
            reasons = zip(new, pool.map(_unreadable, [items[n] for n in new]), strict=True)
        left_out = {number: reason for number, reason in reasons if reason is not None}
        good = [number for number in range(len(files)) if number not in left_out]
        if not good:
            raise UserError(f"{self.folder} holds no image that can be read")
        embedded = embed_missing(
            self.store,
            [items[n] for n in good],
            keys[good],
            lambda some: self.embedder.stream(some, threads=self.threads),
        )
        self.files = [files[n] for n in good]
        self._vectors = self.store.vectors(keys[good])
        return embedded, {files[number]: reason for number, reason in left_out.items()}

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
    order = np.argsort(-scores, kind="stable")[:top]
    return order, scores[order]


def image_files(folder: Path) -> list[Path]:
    """Names of image files relative to a resolved folder, sorted.

    Hidden files and folders are left out, and so are links that lead out of the folder.
    """
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(here, name)
            is_image = path.suffix.lower() in SUFFIXES and not name.startswith(".")
            if is_image and is_inside(path, folder):
                found.append(path.relative_to(folder))
    return sorted(found)


def existing(folder: Path) -> Path:
    """The folder itself, whatever links lead there.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    return folder.resolve()


def is_inside(path: Path, root: Path) -> bool:
    """Whether a file is there and really lies below a resolved folder, whatever links say."""
    real = path.resolve()
    return real.is_relative_to(root) and real.is_file()


def cache_keys(files: Sequence[Path], items: Sequence[Item]) -> Keys:
    """int64 [N], by names relative to the folder, which may move with its vectors."""
    names = (os.fsencode(file.as_posix()) for file in files)  # a name need not be text
    digests = (as_key(hashlib.blake2b(name, digest_size=8).digest()) for name in names)
    states = map(file_state, items)
    return np.array([a ^ b for a, b in zip(digests, states, strict=True)], np.int64)


def _unreadable(item: Item) -> str | None:
    """Why an image cannot be embedded; it is decoded for this."""
    try:
        open_image(item.media[0], where="left out")
    except UserError as error:
        return str(error)
    return None
