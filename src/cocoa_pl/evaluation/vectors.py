"""Vectors in float16 or float32, computed with as float32 blocks."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def read(vectors: Floats, rows: slice | Ints) -> NDArray[np.float32]:
    """Some vectors as float32: [n, D]. Neighbours in their order are not copied one by one."""
    if not isinstance(rows, slice) and len(rows) and (np.diff(rows) == 1).all():
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
    return to_float32(vectors[rows])


def to_float32(vectors: Floats) -> NDArray[np.float32]:
    """As float32; float32 as it is, without a copy."""
    if vectors.dtype != np.float16:
        return vectors.astype(np.float32, copy=False)
    # numpy converts half precision one number at a time; torch by vector instructions.
    return torch.from_numpy(vectors).float().numpy()


def blocks(count: int, size: int) -> Iterator[slice]:
    """0..count in pieces of at most `size`, which is taken as 1 where it is less."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def evenly_spaced(length: int, *, count: int) -> Ints:
    """Up to `count` of `length` places, evenly spaced from the first to the last."""
    return np.linspace(0, length - 1, num=min(count, length)).round().astype(int)
