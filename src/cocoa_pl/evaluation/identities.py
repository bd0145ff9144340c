"""Items in, what their kept vectors are found by out: keys of items, states of image files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.data.items import Item, as_key
from cocoa_pl.evaluation.vectors import Ints


@dataclass(frozen=True)
class Identities:
    """What vectors of N items are found by: `Item.key`, and states of image files; int64 [N]."""

    keys: NDArray[np.int64]
    stamps: NDArray[np.int64]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Identities:
        """Looks at each image file once, without reading it."""
        return cls(
            np.array([item.key for item in items], np.int64),
            np.array([file_stamp(item) for item in items], np.int64),
        )

    def __getitem__(self, rows: Ints | slice) -> Identities:
        return Identities(self.keys[rows], self.stamps[rows])

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def both(self) -> NDArray[np.int64]:
        """One number each: both halves are hashes."""
        return self.keys ^ self.stamps


def file_stamp(item: Item) -> int:
    """A 63-bit hash of the sizes and times of the item's image files; 0 if it has none.

    The time of change counts beside that of modification, which archives and `cp -p` set back, and
    which files swapped for each other keep. A file that is not there has a stamp too: embedding it
    is what tells.
    """
    paths = [image for image in item.media if isinstance(image, Path)]
    if not paths:
        return 0
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            digest.update(b"missing ")
            continue
        digest.update(f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} ".encode())
    return as_key(digest.digest())
