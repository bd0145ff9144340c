"""Items in, the vectors of one model that a folder keeps of them out.

A run that was killed finds here what it had finished; several processes write into one folder. A
vector is found by its item's key and by the state of the item's image files: when one of them has
changed, the vector is of something else.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.identities import Identities
from cocoa_pl.evaluation.shards import DRAFT, SUFFIX, DamagedShard, Shard, read_shard, write_shard
from cocoa_pl.evaluation.vectors import Floats, Ints

log = logging.getLogger(__name__)

FORMAT = 2  # how models and items are told apart, too
DTYPES = ("float16", "float32")
META = "store.json"

_SPOKEN = ("stored_as", "dtype")  # entries that say something to a person
_DEAD_DRAFT_SECONDS = 3600.0  # writing a shard takes seconds


class StoredVectors:
    """Vectors [N, D] of a store, in any order; what is asked for is read from the shards' maps."""

    def __init__(self, shards: Sequence[Floats], rows: NDArray[np.int64], *, dim: int) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self._rows = rows  # of each vector, counted through all shards
        self.shape = (len(rows), dim)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Ints | slice) -> Floats:
        wanted = self._rows[rows]
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        used = np.unique(shard_of)
        if len(used) == 1:
            found: Floats = np.asarray(self._shards[used[0]][wanted - self._starts[used[0]]])
            return found
        order = np.argsort(shard_of, kind="stable")
        bounds = np.searchsorted(shard_of[order], [*used, len(self._shards)])
        dtype = self._shards[0].dtype if self._shards else np.float32
        vectors = np.empty((len(wanted), self.shape[1]), dtype)
        for shard, start, stop in zip(used, bounds[:-1], bounds[1:], strict=True):
            places = order[start:stop]
            vectors[places] = self._shards[shard][wanted[places] - self._starts[shard]]
        return vectors


class VectorStore:
    """The vectors of one model in a folder.

    Args:
        folder: made if it is not there.
        identity: what the vectors depend on (`Embedder.identity`).
        dim: components of a vector.
        dtype: a name in `DTYPES`.

    Shards that are damaged are named in the log and left alone; what they held counts as missing
    and is embedded again, which costs time but never a score.

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
            self._drop_dead_drafts()
        except OSError as error:
            raise UserError(f"store {folder}: {error}") from error
        self.reload()

    def reload(self) -> None:
        """Read what there is by now, other processes' shards included."""
        self._shards = list(filter(None, map(self._read, sorted(self.folder.glob(f"*{SUFFIX}")))))
        empty = np.empty(0, np.int64)
        known = Identities(
            np.concatenate([empty, *(shard.keys for shard in self._shards)]),
            np.concatenate([empty, *(shard.stamps for shard in self._shards)]),
        )
        self._order = np.argsort(known.both, kind="stable")
        self._sorted = known.both[self._order]
        self._keys = np.unique(known.keys)

    def __len__(self) -> int:
        return len(self._sorted)

    def find(self, wanted: Identities) -> NDArray[np.int64]:
        """Where vectors of these items lie: int64 [N], -1 for those that are missing."""
        if not len(self._sorted):
            return np.full(len(wanted), -1, np.int64)
        both = wanted.both
        place = np.minimum(np.searchsorted(self._sorted, both), len(self._sorted) - 1)
        found: NDArray[np.int64] = np.where(
            self._sorted[place] == both, self._order[place], np.int64(-1)
        )
        return found

    def count_changed(self, missing: Identities) -> int:
        """How many of these are known but for an image file that has changed since."""
        return int(np.isin(missing.keys, self._keys).sum())

    def vectors(self, wanted: Identities) -> StoredVectors:
        """The vectors of these items.

        Raises:
            UserError: if one is not there.
        """
        rows = self.find(wanted)
        if missing := int((rows < 0).sum()):
            raise UserError(
                f"store {self.folder} lacks {missing} of {len(rows)} vectors; "
                "run the same command again, which embeds what is missing"
            )
        return StoredVectors([shard.vectors for shard in self._shards], rows, dim=self.dim)

    def write(self, identities: Identities, vectors: Floats) -> None:
        """Add a shard on the disk; `reload` makes it known here.

        Raises:
            UserError: if the disk does not take it.
        """
        try:
            kept = vectors.astype(self.dtype)
            write_shard(self.folder, identities.keys, identities.stamps, kept)
        except OSError as error:
            raise UserError(f"store {self.folder} cannot be written: {error}") from error

    def _read(self, path: Path) -> Shard | None:
        try:
            return read_shard(path, dim=self.dim, dtype=self.dtype)
        except DamagedShard as error:
            log.warning(
                "%s is damaged (%s): what it held is embedded again; the file can be deleted",
                path,
                error,
            )
            return None

    def _check_model(self, mine: dict[str, Any]) -> None:
        """Compare with the model that the folder belongs to, or make it this one's."""
        path = self.folder / META
        if not path.is_file():
            if next(self.folder.glob(f"*{SUFFIX}"), None):
                raise UserError(
                    f"{self.folder} holds {SUFFIX} files but no {META}: it is no store; "
                    "give another folder"
                )
            draft = self.folder / f"{uuid.uuid4().hex}{DRAFT}"
            draft.write_text(json.dumps(mine, indent=1))
            draft.rename(path)  # several processes of one job write the same
            return
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if difference := _difference(kept, mine):
            raise UserError(
                f"store {self.folder} holds vectors of another model ({difference}); "
                "give another folder, or delete this one"
            )

    def _drop_dead_drafts(self) -> None:
        """What killed runs left half written, by its kind of name: others may keep drafts here,
        too. A living one's draft is seconds old.
        """
        for draft in self.folder.glob(f"{'[0-9a-f]' * 32}{DRAFT}"):
            with suppress(FileNotFoundError):  # it has just become a shard
                if time.time() - draft.stat().st_mtime > _DEAD_DRAFT_SECONDS:
                    draft.unlink()


def _difference(kept: dict[str, Any], mine: dict[str, Any]) -> str:
    """The first entry that tells two models apart, in words; empty if none does."""
    for name in {**mine, **kept}:
        there, here = kept.get(name), mine.get(name)
        if name in ("fingerprint", "tolerance") or there == here:
            continue
        if isinstance(there, int) or (name in _SPOKEN and isinstance(there, str)):
            return f"its {name} is {there}, here it is {here}"
        return f"its {name} is another"
    apart = float(np.abs(np.subtract(kept["fingerprint"], mine["fingerprint"])).max())
    if not apart <= mine["tolerance"]:
        return f"the same inputs give other vectors, which differ by up to {apart:.2g}"
    return ""
