"""Every distinct image of the data: its size, the hash of its content, or why it cannot be used.

Each file is read and decoded once, by the code that training uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from cocoa_pl.data.datamodule import start_worker
from cocoa_pl.data.images import ImageSource, open_image
from cocoa_pl.data.items import Item, as_key
from cocoa_pl.data.processor import Processor
from cocoa_pl.distributed.processes import is_lost_worker
from cocoa_pl.errors import UserError

CHUNK = 64  # images: a second or less of work
TINY_SIDE = 8  # pixels; below it there is nothing to see

Fault = tuple[str, str]  # a kind of finding, and the reader's words without the row
Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]  # values, label, how many -> values


class DistinctImages:
    """All distinct images of the data, numbered in the order in which they are first met."""

    def __init__(self) -> None:
        self.sources: list[ImageSource] = []
        self._numbers: dict[str | bytes, int] = {}
        self.sizes = np.empty((0, 2), dtype=np.int64)  # [N, 2] width and height; 0 if unreadable
        self.digests = np.empty(0, dtype=np.uint64)  # [N] of the files' bytes
        self.faults: dict[int, Fault] = {}

    def __len__(self) -> int:
        return len(self.sources)

    def note(self, item: Item) -> None:
        """Number the images of an item that were not met before."""
        for image in item.media:
            new = len(self.sources)
            if self._numbers.setdefault(_identity(image), new) == new:
                self.sources.append(image)

    def number(self, image: ImageSource) -> int:
        return self._numbers[_identity(image)]

    def open_all(self, *, workers: int, watch: Watch) -> None:
        """Decode every image."""
        self.sizes = np.zeros((len(self), 2), dtype=np.int64)
        self.digests = np.zeros(len(self), dtype=np.uint64)
        opened = in_workers(_open, self.sources, chunk=CHUNK, workers=workers)
        for number, (size, digest, fault) in enumerate(watch(opened, "images", len(self))):
            self.sizes[number], self.digests[number] = size, digest
            if fault:
                self.faults[number] = fault

    def visual_tokens(self, processor: Processor) -> np.ndarray:
        """int64 [N] visual tokens of each distinct image; -1 for those that cannot be read."""
        distinct, inverse = np.unique(self.sizes, axis=0, return_inverse=True)
        counts = [processor.count_visual_tokens(w, h) if w else -1 for w, h in distinct.tolist()]
        return np.array(counts, dtype=np.int64)[inverse.reshape(-1)]

    def content_key(self, item: Item) -> int:
        """63-bit identity of text and image contents, whatever the files are called."""
        digest = hashlib.blake2b(item.text.encode(), digest_size=8)
        for image in item.media:
            digest.update(b"\0" + int(self.digests[self.number(image)]).to_bytes(8, "little"))
        return as_key(digest.digest())


def in_workers(
    work: Callable[[Any], Iterable[Any]], values: Sequence[Any], *, chunk: int, workers: int
) -> Iterator[Any]:
    """What `work` makes of `chunk` values at a time, one after the other in their order.

    Args:
        workers: processes; 0 computes here.

    Raises:
        UserError: when a process dies, which is what happens when memory runs out.
    """
    data: Any = values  # what has a length and places is a data set
    try:
        for results in DataLoader(
            data, chunk, collate_fn=work, num_workers=workers, worker_init_fn=start_worker
        ):
            yield from results
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise UserError(
            "a worker process was killed, most likely because memory ran out; "
            f"use fewer than workers={workers}"
        ) from error


def file_name(image: ImageSource) -> str:
    """The path of an image, or nothing for one that is not a file."""
    return str(image) if isinstance(image, Path) else ""


def _open(sources: Sequence[ImageSource]) -> list[tuple[tuple[int, int], int, Fault | None]]:
    """Of each image its size, the digest of its bytes, and why it cannot be used."""
    opened: list[tuple[tuple[int, int], int, Fault | None]] = []
    for source in sources:
        try:
            size = open_image(source, where="").size
            # Its bytes come from the page cache: it was just decoded.
            opened.append((size, _digest(_content(source)), None))
        except (UserError, OSError) as error:
            kind = error.kind if isinstance(error, UserError) else "corrupt_image"
            # A digest of its own: two unreadable files are not the same image.
            digest = _digest(b"unreadable\0" + str(source).encode(errors="replace"))
            opened.append(((0, 0), digest, (kind, str(error))))
    return opened


def _content(source: ImageSource) -> bytes:
    if isinstance(source, Path):
        return source.read_bytes()
    return source if isinstance(source, bytes) else source.tobytes()


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _identity(image: ImageSource) -> str | bytes:
    """What tells images apart before they are opened: a path, or a hash of embedded bytes."""
    if isinstance(image, Path):
        return str(image)
    return hashlib.blake2b(_content(image), digest_size=16).digest()
