"""The image files below a folder, and why some of them cannot be read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cocoa_pl.data.images import open_image
from cocoa_pl.data.items import IMAGE_SLOT, Item, as_key
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.store import Keys, file_state

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
)


def image_files(folder: Path) -> list[Path]:
    """Names of image files relative to the folder, sorted.

    Hidden files and folders are left out, and so are links that lead out of the folder.

    Raises:
        UserError: if there is no such folder.
    """
    root, found = existing(folder), []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(here, name)
            is_image = path.suffix.lower() in SUFFIXES and not name.startswith(".")
            if is_image and is_inside(path, root):
                found.append(path.relative_to(root))
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


def items_of(folder: Path, files: Sequence[Path]) -> list[Item]:
    """Each image alone, without a text."""
    return [Item(IMAGE_SLOT, (folder.resolve() / file,)) for file in files]


def cache_keys(files: Sequence[Path], items: Sequence[Item]) -> Keys:
    """int64 [N], by names relative to the folder, which may move with its vectors."""
    names = (os.fsencode(file.as_posix()) for file in files)  # a name need not be text
    digests = (as_key(hashlib.blake2b(name, digest_size=8).digest()) for name in names)
    states = map(file_state, items)
    return np.array([a ^ b for a, b in zip(digests, states, strict=True)], np.int64)


def unreadable(items: Sequence[Item], *, threads: int) -> dict[int, str]:
    """By place, why an image cannot be embedded; each of them is decoded for this."""

    def reason(item: Item) -> str | None:
        try:
            open_image(item.media[0], where="left out")
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        found = enumerate(pool.map(reason, items))
        return {place: text for place, text in found if text is not None}
