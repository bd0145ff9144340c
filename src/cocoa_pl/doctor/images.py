"""Every distinct image of the data: its size, the hash of its content, or why it cannot be used.

Each file is read and decoded once, by the code that training uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cocoa_pl.data.images import ImageSource, open_image
from cocoa_pl.data.items import Item, as_key
from cocoa_pl.doctor.parallel import ordered_map
from cocoa_pl.doctor.row_errors import kind_of
from cocoa_pl.errors import UserError

CHUNK = 64  # images: a second or less of work
TINY_SIDE = 8  # pixels; below it there is nothing to see

_WHERE = "image"


@dataclass(frozen=True)
class Fault:
    """Why an image cannot be used: a kind of finding, and the reader's words without the row."""

    kind: str
    message: str


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
            if self._numbers.setdefault(image_identity(image), new) == new:
                self.sources.append(image)

    def number(self, image: ImageSource) -> int:
        return self._numbers[image_identity(image)]

    def open_all(self, *, workers: int, advance: Callable[[int], None]) -> None:
        """Decode every image; `advance` is called with the number of those that are done."""
        sizes: list[np.ndarray] = []
        digests: list[np.ndarray] = []
        done = 0
        for result in ordered_map(_open_chunk, _chunks(self.sources), workers=workers):
            sizes.append(result.sizes)
            digests.append(result.digests)
            self.faults |= {done + place: fault for place, fault in result.faults.items()}
            done += len(result.sizes)
            advance(len(result.sizes))
        if sizes:
            self.sizes, self.digests = np.concatenate(sizes), np.concatenate(digests)

    def content_key(self, item: Item) -> int:
        """63-bit identity of text and image contents, whatever the files are called."""
        digest = hashlib.blake2b(item.text.encode(), digest_size=8)
        for image in item.media:
            digest.update(b"\0" + int(self.digests[self.number(image)]).to_bytes(8, "little"))
        return as_key(digest.digest())


def file_name(image: ImageSource) -> str:
    """The path of an image, or nothing for one that is not a file."""
    return str(image) if isinstance(image, Path) else ""


@dataclass(frozen=True)
class _Opened:
    sizes: np.ndarray
    digests: np.ndarray
    faults: dict[int, Fault]


def _open_chunk(sources: Sequence[ImageSource]) -> _Opened:
    sizes = np.zeros((len(sources), 2), dtype=np.int64)
    digests = np.zeros(len(sources), dtype=np.uint64)
    faults: dict[int, Fault] = {}
    for place, source in enumerate(sources):
        try:
            sizes[place] = open_image(source, where=_WHERE).size
            digests[place] = _digest(_content(source))
        except (UserError, OSError) as error:
            message = str(error).removeprefix(f"{_WHERE}: ")
            faults[place] = Fault(kind_of(message)[0], message)
            # A digest of its own: two unreadable files are not the same image.
            digests[place] = _digest(b"unreadable\0" + str(source).encode(errors="replace"))
    return _Opened(sizes, digests, faults)


def _content(source: ImageSource) -> bytes:
    if isinstance(source, Path):
        return source.read_bytes()  # from the page cache: it was just decoded
    return source if isinstance(source, bytes) else source.tobytes()


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def image_identity(image: ImageSource) -> str | bytes:
    """What tells images apart before they are opened: a path, or a hash of embedded bytes."""
    if isinstance(image, Path):
        return str(image)
    return hashlib.blake2b(_content(image), digest_size=16).digest()


def _chunks(sources: Sequence[ImageSource]) -> Iterator[Sequence[ImageSource]]:
    return (sources[start : start + CHUNK] for start in range(0, len(sources), CHUNK))
