"""Vectors of a benchmark's subsets: in memory, or in a folder that outlives the run.

In a folder there is one safetensors file for each subset and process, below a name that stands for
all that vectors depend on, so that another model's are never among them:

    <store>/<digest of the model>/<subset>-<digest of its items>.<process>of<processes>.safetensors
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cocoa_pl.data.images import file_state
from cocoa_pl.data.items import EvalSubset, Item, numbered
from cocoa_pl.distributed.collectives import all_objects, rank, world_size
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.scoring import Floats

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[Item]], Floats]  # items -> float32 [N, D], unit length
Vectors = Iterator[tuple[Floats, Floats]]  # of each subset: queries [U, D], candidates [N, D]

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class VectorSettings:
    """How the items of a benchmark are embedded, and where their vectors are.

    Attributes:
        batch_tokens: that go through the model together.
        threads: that read and tokenize ahead of it.
        store: folder that keeps the vectors; None has them in memory, in float32.
        store_dtype: of the vectors in it, `float16` or `float32`.
    """

    batch_tokens: int = 8192
    threads: int = 4
    store: Path | None = None
    store_dtype: str = "float16"


IN_MEMORY = VectorSettings()


def embedded(model: Embedder, subsets: Sequence[EvalSubset], settings: VectorSettings) -> Vectors:
    """The vectors of subset after subset; with a store all processes of the job fill it first, each
    with its share of every subset.

    Raises:
        UserError: for an item that cannot be embedded, or a kept file that is damaged.
    """
    given: Any = {"batch_tokens": settings.batch_tokens, "threads": settings.threads}
    if settings.store is None:
        return encode_once(partial(model.encode, **given), subsets)
    described = json.dumps([model.identity(), settings.store_dtype], sort_keys=True)
    folder = settings.store / hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    def encode(items: Sequence[Item]) -> Floats:
        """As they are kept: the vectors of a large subset in float32 are twice as many bytes."""
        vectors = np.empty((len(items), model.dim), settings.store_dtype)
        with closing(model.stream(items, **given)) as parts:
            for places, some in parts:
                vectors[places] = some
        return vectors

    folder.mkdir(parents=True, exist_ok=True)
    for subset in subsets:
        fill(folder, subset, encode, rank=rank(), world_size=world_size())
    all_objects("done")  # scoring waits until every process has embedded its share
    return (kept(folder, subset) for subset in subsets)


def fill(
    folder: Path, subset: EvalSubset, encode: Encode, *, rank: int = 0, world_size: int = 1
) -> None:
    """Embed this process's share of a subset into a file, unless it, or a whole set, is there.

    Raises:
        UserError: for an item that cannot be embedded.
    """
    items, _ = numbered([*subset.queries, *subset.candidates])
    stem = _stem(subset, items)
    path = folder / f"{stem}.{rank}of{world_size}{SUFFIX}"
    share = items[rank::world_size]
    if path.is_file() or _files(folder, stem):
        log.info("%s: its vectors are in %s", subset.name, folder)
    else:
        log.info("%s: embedding %s items into %s", subset.name, f"{len(share):,}", folder)
        vectors = _encoded(encode, subset, share)
        draft = path.with_suffix(".part")  # what a killed run left of one is written over
        try:
            save_file({"vectors": vectors}, draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def kept(folder: Path, subset: EvalSubset) -> tuple[Floats, Floats]:
    """The vectors of a subset's queries and of its candidates.

    Raises:
        UserError: if they are not there, or damaged.
    """
    items, places = numbered([*subset.queries, *subset.candidates])
    files = _files(folder, _stem(subset, items))
    if not files:
        raise UserError(
            f"{folder} lacks vectors of {subset.name}: the images changed while they were read, or "
            "the processes of the job do not share the folder; run the same command again"
        )
    shares = []
    for file in files:
        try:
            shares.append(load_file(file)["vectors"])
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{file} is damaged ({error}); delete it and run the same command again"
            ) from error
    vectors = np.empty((len(items), shares[0].shape[1]), shares[0].dtype)
    for number, share in enumerate(shares):
        vectors[number :: len(files)] = share
    return vectors[places[: len(subset.queries)]], vectors[places[len(subset.queries) :]]


def _stem(subset: EvalSubset, items: Sequence[Item]) -> str:
    """What a subset's files are called: another item, or a changed image file, is another name.

    A missing file has a state too: embedding it raises.
    """
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update(item.key.to_bytes(8, "little"))
        for path in (medium for medium in item.media if isinstance(medium, Path)):
            try:
                digest.update(f"{file_state(path.stat())} ".encode())
            except OSError:
                digest.update(b"missing")
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', subset.name)[:60]}-{digest.hexdigest()}"


def _files(folder: Path, stem: str) -> list[Path]:
    """The files of all processes of a job that has embedded the subset; empty if none has."""
    for first in sorted(folder.glob(f"{stem}.0of*{SUFFIX}")):
        count = int(first.name.removesuffix(SUFFIX).rpartition("of")[2])
        files = [folder / f"{stem}.{number}of{count}{SUFFIX}" for number in range(count)]
        if all(file.is_file() for file in files):
            return files
    return []


def encode_once(encode: Encode, subsets: Sequence[EvalSubset]) -> Vectors:
    """Vectors in memory: an item that several subsets hold is encoded once, when the first of them
    comes, and let go behind the last.
    """
    items_of = [[*subset.queries, *subset.candidates] for subset in subsets]
    keys_of = [[item.key for item in items] for items in items_of]
    last = {key: number for number, keys in enumerate(keys_of) for key in keys}
    known: dict[int, Floats] = {}
    for number, (subset, keys) in enumerate(zip(subsets, keys_of, strict=True)):
        items = dict(zip(keys, items_of[number], strict=True))
        new = {key: item for key, item in items.items() if key not in known}
        if new:
            found = _encoded(encode, subset, [*new.values()])
            # Copies: a view would keep the whole array alive until its last row is dropped.
            known |= {key: vector.copy() for key, vector in zip(new, found, strict=True)}
        vectors = np.stack([known[key] for key in keys])
        known = {key: vector for key, vector in known.items() if last[key] > number}
        yield vectors[: len(subset.queries)], vectors[len(subset.queries) :]


def _encoded(encode: Encode, subset: EvalSubset, items: Sequence[Item]) -> Floats:
    """Their vectors; an error names the first row that an item belongs to, and its role there."""
    try:
        return encode(items)
    except UserError as error:
        if error.item is None:
            raise
        bad = items[error.item].key
        rows = zip(subset.row_ids, subset.query_index, subset.candidate_index, strict=True)
        for row_id, query, index in rows:
            sides = [("query", subset.queries[query])]
            sides += [("candidate", subset.candidates[place]) for place in index]
            for role, item in sides:
                if item.key == bad:
                    error.row_id, error.role = row_id, role
                    raise
        raise
