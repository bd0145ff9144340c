"""Keys and vectors in, one file out that is whole or not there; and back, memory-mapped.

A shard is a safetensors file: `keys` and `stamps` int64 [n], `vectors` float16 or float32 [n, D],
and a checksum of them in its metadata. Any safetensors reader opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cocoa_pl.evaluation.vectors import Floats

SUFFIX = ".safetensors"
DRAFT = ".draft"  # while a shard is written

_PARTS = ("keys", "stamps", "vectors")


class DamagedShard(Exception):
    """A file that is not the shard that was written; says what is wrong with it."""


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        keys: int64 [n], identities of items as `Item.key` gives them.
        stamps: int64 [n], states of the image files when they were embedded.
        vectors: [n, D], a memory map.
    """

    path: Path
    keys: NDArray[np.int64]
    stamps: NDArray[np.int64]
    vectors: Floats


def write_shard(
    folder: Path, keys: NDArray[np.int64], stamps: NDArray[np.int64], vectors: Floats
) -> Path:
    """Write a new shard; its name is its own, so that no other process writes the same file."""
    arrays = dict(zip(_PARTS, (keys, stamps, np.ascontiguousarray(vectors)), strict=True))
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    draft = path.with_suffix(DRAFT)
    with draft.open("wb") as file:
        file.write(save(arrays, metadata={"checksum": _checksum(*arrays.values())}))
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the content
    draft.rename(path)
    return path


def read_shard(path: Path, *, dim: int, dtype: str) -> Shard:
    """Open a shard and check every byte of it.

    Raises:
        DamagedShard: if it is cut off, holds something else, or does not have its checksum.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if set(file.keys()) != set(_PARTS):
                raise DamagedShard(f"it holds {', '.join(file.keys())}")
            keys, stamps = file.get_tensor("keys"), file.get_tensor("stamps")
    except (SafetensorError, OSError) as error:
        raise DamagedShard(str(error)) from error
    vectors = _mapped(path, "vectors")
    if vectors.dtype != dtype or vectors.shape != (len(keys), dim) or len(stamps) != len(keys):
        raise DamagedShard(f"its vectors are {vectors.dtype} {vectors.shape}")
    if metadata.get("checksum") != _checksum(keys, stamps, vectors):
        raise DamagedShard("its content does not have its checksum")
    return Shard(path, keys, stamps, vectors)


def _mapped(path: Path, name: str) -> Floats:
    """A tensor of a safetensors file that has been checked, without reading it.

    Format: 8 bytes with the length of the header, the header in JSON, then the tensors.
    https://github.com/huggingface/safetensors#format
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(size))[name]
    dtype = {"F16": "float16", "F32": "float32"}.get(tensor["dtype"])
    if dtype is None:
        raise DamagedShard(f"its {name} are {tensor['dtype']}")
    start, shape = 8 + size + tensor["data_offsets"][0], tuple(tensor["shape"])
    mapped: Floats = np.memmap(path, dtype, mode="r", offset=start, shape=shape)
    return mapped


def _checksum(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()
