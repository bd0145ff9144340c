"""A folder that keeps the vectors of one model, for evaluations that go on or share their work.

It holds safetensors files with `keys` int64 [n] and `vectors` float16 or float32 [n, D]. A file has
its name once all of it is on the disk, so that a killed run leaves none that is half written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from cocoa_pl.data.items import Item, as_key
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Floats

log = logging.getLogger(__name__)

FORMAT = 3  # of models' and items' identities, too
DTYPES = ("float16", "float32")
META = "store.json"
SUFFIX = ".safetensors"
FILE_VECTORS = 4096  # of one file: at most so many are embedded again after a kill

Keys = NDArray[np.int64]
# Items -> their places and vectors, batch after batch (`Embedder.stream`).
Stream = Callable[[Sequence[Item]], Generator[tuple[NDArray[np.intp], Floats]]]

_SHOWN = ("stored_as", "dtype")  # text entries that mean something to a person


def cache_keys(items: Sequence[Item]) -> Keys:
    """int64 [N]: what the vectors of items are found by, their content and their files' states."""
    return np.array([item.key ^ file_state(item) for item in items], np.int64)


def file_state(item: Item) -> int:
    """A 63-bit hash of the sizes and times of the item's image files; 0 if it has none.

    The time of change counts beside that of modification, which archives and `cp -p` set back, and
    which files swapped for each other keep. A missing file has a state too: embedding it raises.
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


class VectorStore:
    """The vectors of one model in a folder.

    Args:
        folder: made if it is not there.
        identity: what the vectors depend on (`Embedder.identity`).
        dim: components of a vector.
        dtype: a name in `DTYPES`.

    Files that cannot be read are named in the log and left alone; what they held is missing.

    Raises:
        UserError: if the folder cannot be written, holds another model's vectors, or another dtype.
    """

    def __init__(self, folder: Path, *, identity: dict[str, Any], dim: int, dtype: str) -> None:
        if dtype not in DTYPES:
            raise UserError(f"store_dtype={dtype}: choose {' or '.join(DTYPES)}")
        self.folder = folder
        self.dim = dim
        self.dtype = dtype
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_model({"format": FORMAT, "dim": dim, "stored_as": dtype, **identity})
        except OSError as error:
            raise UserError(f"store {folder}: {error}") from error
        self.reload()

    def reload(self) -> None:
        """Find all files, those that other processes have written included."""
        self._files: list[Path] = []
        self._place: dict[int, tuple[int, int]] = {}  # key -> file, row
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                with safe_open(path, framework="numpy") as file:
                    self._note(path, file.get_tensor("keys"))
            except (SafetensorError, OSError) as error:
                log.warning(
                    "%s is damaged (%s): what it held is embedded again; the file can be deleted",
                    path,
                    error,
                )

    def __len__(self) -> int:
        return len(self._place)

    def missing(self, keys: Keys) -> NDArray[np.intp]:
        """Places of the keys that have no vector."""
        return np.flatnonzero([key not in self._place for key in keys.tolist()])

    def vectors(self, keys: Keys) -> Floats:
        """The vectors [N, D] of these keys.

        Raises:
            UserError: if one is not there.
        """
        if count := len(self.missing(keys)):
            raise UserError(
                f"store {self.folder} lacks {count} of {len(keys)} vectors; "
                "run the same command again, which embeds what is missing"
            )
        places = np.array([self._place[key] for key in keys.tolist()]).reshape(-1, 2)
        found = np.empty((len(keys), self.dim), self.dtype)
        for number in np.unique(places[:, 0]).tolist():
            here = places[:, 0] == number
            found[here] = load_file(self._files[number])["vectors"][places[here, 1]]
        return found

    def add(self, keys: Keys, vectors: Floats) -> None:
        """Write a file of vectors [n, D].

        Raises:
            UserError: if the disk does not take it.
        """
        arrays = {"keys": keys, "vectors": np.ascontiguousarray(vectors, self.dtype)}
        try:
            self._note(self._write(f"{uuid.uuid4().hex}{SUFFIX}", save(arrays)), keys)
        except OSError as error:
            raise UserError(f"store {self.folder} cannot be written: {error}") from error

    def _note(self, path: Path, keys: Keys) -> None:
        rows = ((len(self._files), row) for row in range(len(keys)))
        self._place |= zip(keys.tolist(), rows, strict=True)
        self._files.append(path)

    def _write(self, name: str, content: bytes) -> Path:
        draft = self.folder / f"{uuid.uuid4().hex}.draft"
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        return draft.rename(self.folder / name)

    def _check_model(self, own: dict[str, Any]) -> None:
        """Compare with the model that the folder belongs to, or make it this one's."""
        path = self.folder / META
        if not path.is_file():
            if next(self.folder.glob(f"*{SUFFIX}"), None):
                raise UserError(
                    f"{self.folder} holds {SUFFIX} files but no {META}: it is no store; "
                    "give another folder"
                )
            self._write(META, json.dumps(own, indent=1).encode())  # processes of a job write alike
            return
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if difference := _difference(kept, own):
            raise UserError(
                f"store {self.folder} holds vectors of another model ({difference}); "
                "give another folder, or delete this one"
            )


def embed_missing(
    store: VectorStore,
    items: Sequence[Item],
    keys: Keys,
    stream: Stream,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Embed those items of this process's share that the store lacks.

    A share follows from the key alone: no two processes embed the same item, and a run may go on
    with another number of processes.

    Args:
        keys: int64 [N], of the items; of equal ones the first is embedded.

    Returns:
        How many were embedded.

    Raises:
        UserError: for an item that cannot be embedded; what was finished before it is kept.
    """
    first = np.sort(np.unique(keys, return_index=True)[1])
    own = first[keys[first] % world_size == rank]
    todo = own[store.missing(keys[own])]
    if len(todo):
        log.info(
            "%s of %s vectors are in %s; embedding %s%s",
            f"{len(own) - len(todo):,}",
            f"{len(own):,}",
            store.folder,
            f"{len(todo):,}",
            f" in process {rank + 1} of {world_size}" if world_size > 1 else "",
        )
    batches: list[tuple[NDArray[np.intp], Floats]] = []

    def write() -> None:
        if batches:
            places, vectors = (np.concatenate(parts) for parts in zip(*batches, strict=True))
            store.add(keys[todo[places]], vectors)
            batches.clear()

    with closing(stream([items[place] for place in todo.tolist()])) as stream_of_todo:
        try:
            for batch in stream_of_todo:
                batches.append(batch)
                if sum(len(places) for places, _ in batches) >= FILE_VECTORS:
                    write()
        finally:  # what is finished is kept, whatever ended the rest
            write()
    return len(todo)


def _difference(kept: dict[str, Any], own: dict[str, Any]) -> str:
    """The first entry that tells two models apart, in words; empty if none does."""
    for name in {**own, **kept}:
        there, here = kept.get(name), own.get(name)
        if name in ("fingerprint", "tolerance") or there == here:
            continue
        if isinstance(there, int) or (name in _SHOWN and isinstance(there, str)):
            return f"its {name} is {there}, here it is {here}"
        return f"its {name} is another"
    apart = float(np.abs(np.subtract(kept["fingerprint"], own["fingerprint"])).max())
    if not apart <= own["tolerance"]:
        return f"the same inputs give other vectors, which differ by up to {apart:.2g}"
    return ""
