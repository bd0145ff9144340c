"""One training row with MMEB's columns in, one `Pair` out: shared by local files and streams.

Columns `qry`, `qry_image_path`, `pos_text`, `pos_image_path`; hard negatives, where a corpus has
them, in `neg_text` and `neg_image_path`: a string (MMEB), a list, or a Python list written as a
string (MoCa-CL-Pairs, mmE5), which is parsed and never executed.
"""

import ast
from pathlib import Path
from typing import Any

from cocoa_pl.data.images import embedded
from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.rows import make_item
from cocoa_pl.errors import UserError

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
IMAGE_COLUMNS = ("qry_image_path", "pos_image_path", "neg_image_path")  # paths, or encoded images


def parse_row(
    row: dict[str, Any], *, row_id: str, subset: str, image_root: Path, drop_orphan_slots: bool
) -> Pair:
    """The row as a pair.

    Args:
        row: texts and images as `make_item` takes them.
        drop_orphan_slots: some published rows hold `<|image_1|>` without an image; take it out
            instead of refusing the row.

    Raises:
        UserError: with `row_id`, for a row that cannot be used.
    """

    def side(text: object, image: object, role: str, *, add_missing_slot: bool = False) -> Item:
        return make_item(
            text,
            image,
            role=role,
            where=row_id,
            image_root=image_root,
            add_missing_slot=add_missing_slot,
            drop_orphan_slot=drop_orphan_slots,
        )

    return Pair(
        query=side(row["qry"], row["qry_image_path"], "query"),
        positive=side(row["pos_text"], row["pos_image_path"], "positive"),
        # MMEB's own negatives name images without a placeholder.
        negatives=tuple(
            side(text, image, "negative", add_missing_slot=True)
            for text, image in _negatives(row, where=row_id)
        ),
        subset=subset,
        row_id=row_id,
    )


def _negatives(row: dict[str, Any], *, where: str) -> list[tuple[object, object]]:
    """Text and image of each hard negative; entries with neither are absent, not empty."""
    texts = _as_list(row.get("neg_text") or "", column="neg_text", where=where)
    images = _as_list(row.get("neg_image_path") or "", column="neg_image_path", where=where)
    length = max(len(texts), len(images))
    # A missing column, null, "" and [] mean "none of these"; anything else must match one by one.
    texts = texts if any(texts) else [""] * length
    images = images if any(images) else [""] * length
    if len(texts) != len(images):
        raise UserError(
            f"{where}: neg_text has {len(texts)} entries and neg_image_path {len(images)}; "
            "give one path (or an empty string) for each text"
        )
    return [(text, image) for text, image in zip(texts, images, strict=True) if text or image]


def _as_list(value: object, *, column: str, where: str) -> list[object]:
    """A negative column's value: a list, a Python list written as a string, or a single value."""
    parsed: Any = value
    if isinstance(value, str):
        stripped = value.strip()
        if not (stripped.startswith("[") and stripped.endswith("]")):
            return [value]
        try:
            parsed = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(
                f"{where}: {column} looks like a list but is not one of quoted strings: "
                f"{value[:80]!r}; write strings only"
            ) from error
    entries = [embedded(one) or "" for one in (parsed if isinstance(parsed, list) else [parsed])]
    if not all(isinstance(entry, str | bytes) for entry in entries):
        raise UserError(
            f"{where}: {column} must be a string or a list of strings, found {parsed!r:.80}"
        )
    return entries
