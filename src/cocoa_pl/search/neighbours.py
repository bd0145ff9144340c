"""Vectors and a query in, the nearest ones out: exactly, or for many by faiss."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.errors import extra
from cocoa_pl.evaluation.vectors import Vectors, blocks, read

log = logging.getLogger(__name__)

BLOCK = 1 << 14  # vectors that are widened at once
# Vectors from which on an index pays: below, a query reads all of them in well under a second.
APPROXIMATE_FROM = 200_000
_TRAINED_ON, _PER_LIST = 50, 39  # vectors of a cell: faiss asks for 39 and warns below
_LOOKED_AT = 64  # cells


def nearest(
    query: NDArray[np.float32], vectors: Vectors, top: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Numbers and cosines of the vectors nearest to a query, the best first; the first of equals.

    Args:
        query: [D] and vectors: [N, D], of unit length.
    """
    scores = np.empty(len(vectors), np.float32)
    for part in blocks(len(vectors), BLOCK):
        scores[part] = read(vectors, part) @ query
    top = min(top, len(scores))
    order = np.argsort(-scores, kind="stable")[:top]
    return order, scores[order]


class CellIndex:
    """A faiss index that looks at the cells nearest to a query; kept in a file beside the vectors.

    Args:
        vectors: [N, D], of unit length.
        file: where it is kept; made again when the vectors are others.
        digest: of what the vectors are.

    Raises:
        UserError: without faiss.
    """

    def __init__(self, vectors: Vectors, *, file: Path, digest: str) -> None:
        self.faiss = extra(
            "faiss",
            of="search",
            wanted_by="an index of so many vectors",
            otherwise=", or search exactly with --exact",
        )
        self.file = file.with_name(f"{file.stem}-{digest}{file.suffix}")
        self.older = f"{file.stem}-*{file.suffix}"
        self.index = self._kept() or self._built(vectors)
        self.index.nprobe = min(_LOOKED_AT, self.index.nlist)

    def nearest(
        self, query: NDArray[np.float32], top: int
    ) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """As `nearest`, but for those in cells that were not looked at."""
        scores, numbers = self.index.search(query[None], top)
        found = numbers[0] >= 0
        return numbers[0][found], scores[0][found]

    def _kept(self) -> Any:
        return self.faiss.read_index(str(self.file)) if self.file.is_file() else None

    def _built(self, vectors: Vectors) -> Any:
        count, width = vectors.shape
        cells = max(1, min(4 * int(count**0.5), count // _PER_LIST))
        log.info("building an index of %s cells for %s vectors", f"{cells:,}", f"{count:,}")
        index = self.faiss.index_factory(
            width, f"IVF{cells},SQfp16", self.faiss.METRIC_INNER_PRODUCT
        )
        chosen = np.random.default_rng(0).permutation(count)[: cells * _TRAINED_ON]
        index.train(read(vectors, np.sort(chosen)))
        for part in blocks(count, BLOCK):
            index.add(read(vectors, part))
        for other in self.file.parent.glob(self.older):
            other.unlink()
        self.faiss.write_index(index, str(self.file))
        return index


def digest_of(numbers: NDArray[np.int64]) -> str:
    """Of identities in their order."""
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()
