"""Embeddings wherever they lie in, float32 blocks of them out.

Memory maps in float16 are widened block by block, never as a whole.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

# torch and BLAS share larger pieces of work among threads, which costs more than it gains on rows
# that are used once: reading them is what takes the time.
_SERIAL = 1 << 15


class Vectors(Protocol):
    """N vectors of D components that are read by their numbers: an array, a memory map, a store."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any:
        """The vectors [n, D] of a slice, or of an integer array of numbers."""


def read(vectors: Vectors, rows: slice | Ints) -> NDArray[np.float32]:
    """Some vectors as float32: [n, D]. Neighbours in their order are not copied one by one."""
    if not isinstance(rows, slice) and len(rows) and (np.diff(rows) == 1).all():
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
    return widened(np.asarray(vectors[rows]))


def widened(vectors: Floats) -> NDArray[np.float32]:
    """As float32; float32 as it is, without a copy."""
    if vectors.dtype != np.float16:
        return vectors.astype(np.float32, copy=False)
    if not vectors.flags.writeable:  # a part of a memory map, which torch does not take
        vectors = vectors.copy()
    wide = np.empty(vectors.shape, np.float32)
    # numpy converts half precision one number at a time; torch by vector instructions.
    flat, source = torch.from_numpy(wide.reshape(-1)), torch.from_numpy(vectors).reshape(-1)
    for start in range(0, len(flat), _SERIAL):
        flat[start : start + _SERIAL].copy_(source[start : start + _SERIAL])
    return wide


def blocks(count: int, size: int) -> Iterator[slice]:
    """0..count in pieces of at most `size`, which is taken as 1 where it is less."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def spread(length: int, *, count: int) -> Ints:
    """Up to `count` places of so many, spread evenly from the first to the last."""
    return np.linspace(0, length - 1, num=min(count, length)).round().astype(int)
