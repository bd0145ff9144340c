"""An index of the images below a folder: their vectors, and the nearest ones to a query.

Vectors are kept in the folder's `.cocoa`, for each model apart: what is new or has changed is
embedded, an interrupted run goes on, and what is gone is not found any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from cocoa_pl.data.images import file_state, image_size
from cocoa_pl.data.item_batches import map_ahead, some_threads
from cocoa_pl.data.items import IMAGE_SLOT, Item, as_key
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError, absent
from cocoa_pl.models.exported import digest_of_text

log = logging.getLogger(__name__)

KEPT_IN = ".cocoa"
FORMAT = 4  # of keys and files
BATCH_TOKENS = 4096  # that a signal costs, and that a search waits for while a page indexes
BLOCK = 1 << 14  # vectors that are float32 at once
SAVED_EVERY = 20.0  # seconds of work that a power cut may cost, and that a search does not see

READ = (
    *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
UNREAD = (  # pictures too, which their owner misses
    *(".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".hif", ".ico", ".jxl", ".nef", ".orf"),
    *(".psd", ".raf", ".rw2", ".svg", ".tga"),
)
HEIF = (b"heic", b"heif", b"heim", b"heis", b"heix", b"hevc", b"mif1", b"msf1")
# What systems and servers put beside pictures: thumbnails, deleted files, parts of other files.
NOT_THEIRS = (
    *("@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"),
)


class Found(NamedTuple):
    """An image and its cosine to the query.

    Attributes:
        key: of the file in its present state.
        file: relative to the folder.
    """

    key: int
    file: Path
    score: float


class ImageIndex:
    """The images below a folder, ready to be searched once `update` has run.

    Other threads may search while one updates.

    Args:
        folder: of images.
        kept_in: folder for vectors; None for `.cocoa` in the folder itself.
        threads: that read images.

    Attributes:
        files: names relative to the folder by key, of what `search` finds.
        left_out: what cannot be searched, with the reason.
        progress: images that are done and all that are to be embedded, during an update; (0, 0)
            while the folder is looked at.

    Raises:
        UserError: if the folder is none, or its vectors cannot be kept.
    """

    def __init__(
        self, folder: Path, embedder: Embedder, *, kept_in: Path | None, threads: int
    ) -> None:
        self.folder = existing(folder)
        self.embedder = embedder
        self.threads = threads
        identity = json.dumps([FORMAT, embedder.identity()], sort_keys=True)
        model = digest_of_text(identity)[:16]
        self.kept = KeptVectors((kept_in or self.folder / KEPT_IN) / model, embedder.dim)
        self.progress: tuple[int, int] | None = None
        self._refused: dict[int, str] = {}  # by key: nothing is opened in vain twice
        self._looked: tuple[dict[int, Path], dict[Path, str]] = {}, {}
        self._show()

    @property
    def files(self) -> dict[int, Path]:
        return self._shown[0]

    def update(self) -> int:
        """Look at the folder, embed what is new or has changed, forget what is gone.

        Returns:
            How many files have been embedded.

        Raises:
            UserError: if the folder is gone or vectors cannot be kept. What is embedded until then
                is kept, also when the process is asked to stop.
        """
        self.progress = (0, 0)
        try:
            files, _ = self._looked = look(existing(self.folder))
            self._show()
            new = [key for key in files if key not in self.kept.place and key not in self._refused]
            paths = [self.folder / files[key] for key in new]
            with some_threads(self.threads) as pool:
                reasons = map_ahead(pool, _refusal, paths, ahead=256)
                found = zip(new, reasons, strict=True)
                self._refused |= {key: why for key, why in found if why is not None}
            while todo := [k for k in new if k not in self.kept.place and k not in self._refused]:
                self._embed(todo)
        finally:
            self.progress = None
            self._show()
        return sum(key in self.kept.place for key in new)

    def search(self, query: NDArray[np.float32], top: int, *, skip: int = 0) -> list[Found]:
        """The images nearest to a unit vector [D], the best first; the first of equals comes first.

        Every vector is read: 200,000 of them take well under a second.
        """
        files, rows, vectors = self._shown
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            scores[part] = vectors[rows[part]].astype(np.float32) @ query
        order = np.argsort(-scores, kind="stable")[skip : skip + top]
        keys = list(files)
        return [Found(keys[n], files[keys[n]], float(scores[n])) for n in order.tolist()]

    def _embed(self, keys: list[int]) -> None:
        """Until all are kept, or one cannot be embedded after all, which is left out then."""
        files = self._looked[0]
        items = [Item(IMAGE_SLOT, (self.folder / files[key],)) for key in keys]
        done: list[tuple[list[int], NDArray[np.float32]]] = []
        count, saved = 0, time.monotonic()
        self.progress = (0, len(keys))
        try:
            stream = self.embedder.stream(items, batch_tokens=BATCH_TOKENS, threads=self.threads)
            with closing(stream):
                for places, vectors in stream:
                    done.append(([keys[place] for place in places.tolist()], vectors))
                    count += len(places)
                    self.progress = (count, len(keys))
                    if time.monotonic() - saved > SAVED_EVERY:
                        self.kept.add(done)
                        done, saved = [], time.monotonic()
                        self._show()
        except UserError as error:
            if error.item is None:
                raise
            key = keys[error.item]
            self._refused[key] = _reason(error, self.folder / files[key])
        finally:  # whatever ended it, a signal too
            self.kept.add(done)

    def _show(self) -> None:
        """Replace what is searched, all at once: another thread may be searching."""
        files, left_out = self._looked
        known = {key: file for key, file in files.items() if key in self.kept.place}
        rows = np.array([self.kept.place[key] for key in known], np.intp)
        self._shown = known, rows, self.kept.vectors
        refused = {files[key]: why for key, why in self._refused.items() if why and key in files}
        self.left_out = left_out | refused


class KeptVectors:
    """A folder of safetensors files with `keys` int64 [n] and `vectors` float16 [n, D].

    A file has its name once all of it is on the disk. One that cannot be read is named in the log
    and left alone; what it held is embedded again.

    Attributes:
        place: key -> row of `vectors`, float16 [N, D].

    Raises:
        UserError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder = folder
        self.place: dict[int, int] = {}
        self.vectors = np.empty((0, dim), np.float16)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        keys, vectors = [], [self.vectors]
        for file in sorted(folder.glob("*.safetensors")):
            try:
                arrays = load_file(file)
            except (SafetensorError, OSError) as error:
                log.warning(
                    "%s is damaged (%s): what it held is embedded again; the file can be deleted",
                    *(file, error),
                )
            else:
                keys += arrays["keys"].tolist()
                vectors.append(arrays["vectors"])
        self._note(keys, vectors)

    def add(self, parts: list[tuple[list[int], NDArray[np.float32]]]) -> None:
        """Write a file of keys and vectors [n, D].

        Raises:
            UserError: if the disk does not take it.
        """
        if not parts:
            return
        keys = [key for some, _ in parts for key in some]
        vectors = np.concatenate([some for _, some in parts]).astype(np.float16)
        name = self.folder / uuid.uuid4().hex
        try:
            with name.with_suffix(".draft").open("wb") as file:
                file.write(save({"keys": np.array(keys, np.int64), "vectors": vectors}))
                file.flush()
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            name.with_suffix(".draft").rename(name.with_suffix(".safetensors"))
        except OSError as error:
            raise self._unwritable(error) from error
        self._note(keys, [self.vectors, vectors])

    def _note(self, keys: list[int], vectors: list[NDArray[np.float16]]) -> None:
        self.place |= zip(
            keys, range(len(self.vectors), len(self.vectors) + len(keys)), strict=True
        )
        self.vectors = np.concatenate(vectors)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"vectors cannot be kept in {self.folder} ({error.strerror}); make room there, or give "
            "another folder as --index"
        )


def look(folder: Path) -> tuple[dict[int, Path], dict[Path, str]]:
    """Files below a resolved folder that may be images, by keys of their names and states; and
    images and folders that are left out, with the reason.

    Hidden files and folders are nobody's pictures, nor what is in `NOT_THEIRS`. A file without a
    suffix may be an image. Names are relative to the folder, which may move with its vectors.
    """
    files: dict[int, Path] = {}
    left_out: dict[Path, str] = {}

    def failed(error: OSError) -> None:
        left_out[Path(error.filename).relative_to(folder)] = f"cannot be listed ({error.strerror})"

    for here, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [n for n in folders if n[0] != "." and n.lower() not in NOT_THEIRS]
        for name in names + [n for n in folders if os.path.islink(os.path.join(here, n))]:
            path = Path(here, name)
            suffix = path.suffix.lower()
            if name[0] == "." or (suffix and suffix not in READ + UNREAD):
                continue
            file = path.relative_to(folder)
            if suffix in UNREAD:
                left_out[file] = f"{suffix[1:].upper()} is not read; convert it to JPEG"
                continue
            try:
                state = path.stat()
                leads_out = path.is_symlink() and not path.resolve().is_relative_to(folder)
            except OSError as error:  # a link to nowhere or to itself, a folder without x
                left_out[file] = f"cannot be opened ({error.strerror})"
                continue
            if stat.S_ISDIR(state.st_mode):
                left_out[file] = "is a link to a folder, which is not followed"
            elif not stat.S_ISREG(state.st_mode):
                left_out[file] = "is no file"
            elif leads_out:
                left_out[file] = "is a link that leads out of the folder"
            else:
                files[_key(file, state)] = file
    return dict(sorted(files.items(), key=lambda entry: str(entry[1]))), left_out


def _key(file: Path, state: os.stat_result) -> int:
    """63 bits of a name, which need not be text, and of what changes with the content."""
    digest = hashlib.blake2b(os.fsencode(file.as_posix()), digest_size=8)
    digest.update(f"\0{file_state(state)}".encode())
    return as_key(digest.digest())


def _refusal(path: Path) -> str | None:
    """Why a file cannot be embedded as far as its header says; empty for one without a suffix that
    is no image, None for an image.
    """
    try:
        image_size(path)
    except UserError as error:
        if path.suffix or not isinstance(error.__cause__, UnidentifiedImageError):
            return _reason(error, path)
        start = b""
        with suppress(OSError), path.open("rb") as file:
            start = file.read(12)
        is_heif = start[4:8] == b"ftyp" and start[8:] in HEIF
        return "HEIC is not read; convert it to JPEG" if is_heif else ""
    return None


def _reason(error: UserError, path: Path) -> str:
    return error.message.removeprefix(f"image {path} ").split("; ")[0]


def existing(folder: Path) -> Path:
    """The folder itself, whatever links lead there.

    Raises:
        UserError: if there is no such folder.
    """
    if not os.path.isdir(folder):
        raise absent(folder, "check the path", wanted="folder")
    return folder.resolve()


def is_inside(path: Path, root: Path) -> bool:
    """Whether a file is there and really lies below a resolved folder, whatever links say."""
    try:
        real = path.resolve(strict=True)
        return real.is_relative_to(root) and real.is_file()
    except (OSError, RuntimeError):  # the latter for a link to itself
        return False
