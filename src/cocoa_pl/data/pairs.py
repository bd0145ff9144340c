"""A user's own JSONL or parquet file in, `Pair`s out.

Columns: `query`, `query_image`, `positive`, `positive_image`, and optionally `negatives`, a list of
`{"text": ..., "image": ...}`. Texts and image paths are strings; absent, null or `""` mean "none".
A text may say with `<|image_1|>` where its image belongs; otherwise the image comes first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.data.rows import OnBadRow, collect, make_item
from cocoa_pl.data.tables import read_batches
from cocoa_pl.errors import UserError

_COLUMNS = ("query", "query_image", "positive", "positive_image", "negatives")
_NEGATIVE_KEYS = ("text", "image")


def read_pairs(path: Path, *, subset: str, image_root: Path, on_bad_row: OnBadRow) -> PairTable:
    """All rows of a `.jsonl` or `.parquet` file, as pairs of the subset with this name.

    Messages count lines of JSONL from 1, as editors do, and rows of parquet from 0.

    Raises:
        UserError: a missing or unreadable file, no usable row, or a bad row (`on_bad_row`).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; set data.path to a .jsonl or .parquet file")
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: files ending in {path.suffix!r} are not read; use .jsonl or .parquet"
        )

    def parse(row_id: str, row: object) -> Pair:
        return _pair(row, row_id=row_id, subset=subset, image_root=image_root)

    return collect(readers[path.suffix](path), parse, source=str(path), on_bad_row=on_bad_row)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Each line as a row; one that is not JSON comes as bytes, for `_pair` to refuse by name."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path} line {number}", _json_or_bytes(line)


def _json_or_bytes(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8 or not JSON
        return line


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    for batch in read_batches([path], columns=None, optional=(), batch_size=512):
        for row in batch.to_pylist():
            yield f"{path} row {number}", row
            number += 1


def _pair(row: object, *, row_id: str, subset: str, image_root: Path) -> Pair:
    if isinstance(row, bytes):
        raise UserError(
            f"{row_id}: not valid JSON: {row[:60]!r}; write one object a line, in UTF-8"
        )
    fields = _fields(row, known=_COLUMNS, what="row", where=row_id)

    def side(text: object, image: object, role: str) -> Item:
        return make_item(
            text,
            image,
            role=role,
            where=row_id,
            image_root=image_root,
            add_missing_slot=True,
        )

    negatives = fields.get("negatives")
    if not isinstance(negatives, list | None):
        raise UserError(
            f"{row_id}: negatives must be a list of {{text, image}} objects, "
            f"found {type(negatives).__name__}"
        )
    entries = [
        _fields(entry, known=_NEGATIVE_KEYS, what="negative", where=row_id)
        for entry in negatives or []
    ]
    return Pair(
        query=side(fields.get("query"), fields.get("query_image"), "query"),
        positive=side(fields.get("positive"), fields.get("positive_image"), "positive"),
        negatives=tuple(
            side(entry.get("text"), entry.get("image"), "negative") for entry in entries
        ),
        subset=subset,
        row_id=row_id,
    )


def _fields(value: object, *, known: tuple[str, ...], what: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a {what} must be an object, found {type(value).__name__}")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(
            f"{where}: unknown column {', '.join(map(str, unknown))}; known are {', '.join(known)}"
        )
    return value
