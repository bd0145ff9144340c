"""CoCoA's own JSON files in, pairs of an image and its text out: data of the first two stages.

A folder of `*.json`, each one array of objects and a subset by its file name; the released loaders
read `image_path` and `caption` in stage 1, and `qry`, `qry_image_path` and `pos_text` in stage 2.
Both kinds may lie in one folder; other keys are ignored. Arrays are read piece by piece, because
the parsed objects of a whole file take ten times its size.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cocoa_pl.config.bounds import Count, Seed, ShareBelowOne
from cocoa_pl.data.holdout import as_subsets, hold_out
from cocoa_pl.data.items import EvalSubset, Item, Pair
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.data.rows import OnBadRow, collect, distinct_texts, make_item
from cocoa_pl.errors import UserError

_CHUNK = 1 << 20  # characters
_BLANKS = " \t\r\n"


def read_cocoa_json(
    root: Path, *, image_root: Path, on_bad_row: OnBadRow, max_rows: int | None
) -> PairTable:
    """All files of a folder in name order, of each at most its first `max_rows` objects.

    Messages count an array's objects from 0. A row that repeats another row's texts and image is
    left out and counted in the log.

    Raises:
        UserError: no file, a file that is no JSON array, no usable row, or a bad row
            (`on_bad_row`).
    """
    files = sorted(root.glob("*.json"))
    if not files:
        raise UserError(f"{root} holds no .json file; set data.root to CoCoA's data folder")

    def parse(row_id: str, row: object) -> Pair:
        subset = row_id.rpartition(" row ")[0].removesuffix(".json")
        return _pair(row, row_id=row_id, subset=subset, image_root=image_root)

    return PairTable.concatenated(
        [
            collect(
                _named_rows(path, max_rows=max_rows),
                parse,
                source=str(path),
                on_bad_row=on_bad_row,
                duplicates="drop",
            )
            for path in files
        ]
    )


def iterate_array(path: Path) -> Iterator[Any]:
    """The elements of the JSON array that a file holds, one after the other.

    Raises:
        UserError: for anything but one array in UTF-8, naming the element.
    """
    decoder, number = json.JSONDecoder(), 0
    with path.open(encoding="utf-8") as file:
        text, at_end = "", False
        position = -1  # before the opening bracket
        while True:
            start = _skip(text, max(position, 0), _BLANKS)
            if start < len(text) and (found := text[start]) == ("[" if position < 0 else "]"):
                if found == "]":
                    _check_nothing_follows(path, text[start + 1 :] + file.read())
                    return
                position = start + 1
                continue
            if position >= 0 and start < len(text):
                try:
                    element, end = decoder.raw_decode(text, start)
                    after = _skip(text, end, _BLANKS)
                except (ValueError, RecursionError):
                    after = len(text)  # most likely cut off
                # Whether an element is complete shows by what comes behind it.
                if after < len(text) and text[after] in ",]":
                    yield element
                    number += 1
                    position = after + (text[after] == ",")
                    continue
            if at_end or (position < 0 and start < len(text)):
                raise UserError(
                    f"{path}: not a JSON array of objects; it breaks at element {number}: "
                    f"{text[start : start + 60]!r}"
                )
            chunk = _read(file, path)
            at_end = not chunk
            text, position = text[start:] + chunk, min(position, 0)


def _skip(text: str, position: int, blanks: str) -> int:
    while position < len(text) and text[position] in blanks:
        position += 1
    return position


def _read(file: Any, path: Path) -> str:
    try:
        chunk: str = file.read(_CHUNK)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    return chunk


def _check_nothing_follows(path: Path, rest: str) -> None:
    if rest.strip():
        raise UserError(f"{path}: something follows its JSON array: {rest.strip()[:60]!r}")


def _named_rows(path: Path, *, max_rows: int | None) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(iterate_array(path)):
        if max_rows is not None and number >= max_rows:
            return
        yield f"{path.name} row {number}", row


def _pair(row: object, *, row_id: str, subset: str, image_root: Path) -> Pair:
    if not isinstance(row, dict):
        raise UserError(f"{row_id}: a row must be an object, found {type(row).__name__}")

    def side(text: object, image: object, role: str) -> Item:
        return make_item(
            text,
            _below(image, image_root),
            role=role,
            where=row_id,
            image_root=image_root,
            add_missing_slot=True,
        )

    if "image_path" in row and "caption" in row:
        query = side("", row["image_path"], "image")
        positive = side(row["caption"], "", "caption")
    elif "qry" in row and "pos_text" in row:
        query = side(row["qry"], row.get("qry_image_path"), "query")
        positive = side(row["pos_text"], row.get("pos_image_path"), "positive")
    else:
        raise UserError(
            f"{row_id}: has {', '.join(map(str, row)) or 'no keys'}; "
            "it needs image_path and caption, or qry, qry_image_path and pos_text"
        )
    return Pair(query, positive, (), subset, row_id)


def _below(image: object, root: Path) -> object:
    """An absolute path below the image root, as the released scripts write some, made relative."""
    if isinstance(image, str) and os.path.isabs(image):
        inside = image.startswith(str(root.absolute()) + os.sep)
        return os.path.relpath(image, root.absolute()) if inside else image
    return image


class CocoaJsonData:
    """A folder of CoCoA's JSON files; a part of them is held out for validation.

    Args:
        root: the folder.
        image_root: folder that the rows' image paths are relative to.
        max_rows: rows of each file that are used, from the first on; None for all.
        validation_fraction: share of each file's images (or queries) that is held out; 0 for no
            validation.
        validation_rows: held-out rows of each file that are scored by precision@1.
        validation_seed: chooses what is held out; not the run's seed, so that all runs validate
            alike.
    """

    caption_subsets: Sequence[str] | None = None  # every pair is an image and its text

    def __init__(
        self,
        *,
        root: str,
        image_root: str,
        max_rows: Count | None,
        validation_fraction: ShareBelowOne,
        validation_rows: Count,
        validation_seed: Seed,
        on_bad_row: OnBadRow,
    ) -> None:
        self.root = Path(root)
        self.image_root = Path(image_root)
        self.max_rows = max_rows
        self.validation_fraction = validation_fraction
        self.validation_rows = validation_rows
        self.validation_seed = validation_seed
        self.on_bad_row = on_bad_row

    def train_pairs(self) -> Sequence[Pair]:
        """All rows that are not held out, file after file."""
        return self._parts[0]

    def validation_pairs(self) -> Sequence[Pair]:
        """The held-out rows."""
        return self._parts[1]

    def validation_subsets(self) -> list[EvalSubset]:
        """The held-out rows of each file as a retrieval task among their own positives."""
        return as_subsets(self.validation_pairs(), max_rows=self.validation_rows)

    def training_texts(self) -> list[str]:
        """All distinct training texts without image slots, sorted: a tokenizer learns from them."""
        return distinct_texts(self.train_pairs())

    @cached_property
    def _parts(self) -> tuple[Sequence[Pair], Sequence[Pair]]:
        pairs = read_cocoa_json(
            self.root,
            image_root=self.image_root,
            on_bad_row=self.on_bad_row,
            max_rows=self.max_rows,
        )
        return hold_out(
            pairs,
            fraction=self.validation_fraction,
            seed=self.validation_seed,
            source=str(self.root),
        )
