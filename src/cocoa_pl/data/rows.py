"""Texts and image paths of a row in, checked `Item`s out; a bad row is stopped or skipped here.

Readers (`mmeb`, `pairs`, `cocoa_json`, `stream`) differ in columns and files only. A row they
cannot use raises a `UserError` that names it; `collect` then stops (`on_bad_row: fail`) or counts
it and goes on (`on_bad_row: skip`).
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from cocoa_pl.data.images import embedded, resolve_image
from cocoa_pl.data.items import IMAGE_SLOT, PLACEHOLDER, Item, Pair, placed
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.errors import UserError

OnBadRow = Literal["fail", "skip"]
OnDuplicate = Literal["bad", "drop"]

_ANY_PLACEHOLDER = re.compile(r"<\|image_\d+\|>|<image>")
_SHOWN_ROWS = 3

_log = logging.getLogger(__name__)
_Row = TypeVar("_Row")


def make_item(
    text: object,
    image: object,
    *,
    role: str,
    where: str,
    image_root: Path,
    add_missing_slot: bool,
    drop_orphan_slot: bool = False,
) -> Item:
    """One side of a row as an `Item`; None or `""` means "no text" or "no image".

    Args:
        image: a path below `image_root`, the bytes of an encoded image, or what `datasets` makes of
            one, `{"bytes", "path"}`. A row has at most one on each side.
        add_missing_slot: put an image without a placeholder in front of the text, instead of
            refusing it.
        drop_orphan_slot: take a placeholder without an image out of the text, instead of refusing
            it.

    An image file must exist; it is opened only when its pixels are needed.

    Raises:
        UserError: `where` and `role` with what is wrong and what to do.
    """
    text = "" if text is None else text
    if isinstance(image, list):
        if len(image) > 1:
            raise UserError(f"{where}: the {role} has {len(image)} images; a side of a row has one")
        image = image[0] if image else ""
    image = embedded(image) or ""
    if not isinstance(text, str) or not isinstance(image, str | bytes):
        wrong = text if not isinstance(text, str) else image
        raise UserError(
            f"{where}: the {role} must be a text (a string) and an image (a path, bytes or "
            f"{{bytes, path}}), empty for none; found {type(wrong).__name__}"
        )
    try:
        (text + (image if isinstance(image, str) else "")).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, from JSON
        raise UserError(f"{where}: the {role} is not valid Unicode ({error}); fix it") from error
    if drop_orphan_slot and not image:
        text = text.replace(PLACEHOLDER, "")
    if not image and not text.strip():
        raise UserError(f"{where}: the {role} is empty: it has neither text nor an image")
    if image and not add_missing_slot and not _ANY_PLACEHOLDER.search(text):
        named = image if isinstance(image, str) else f"of {len(image)} bytes"
        raise UserError(
            f"{where}: the {role} has image {named!r:.200} but no {PLACEHOLDER} in its text; "
            "write the placeholder where the image belongs"
        )
    try:
        text = sys.intern(placed(text, 1 if image else 0))
    except ValueError as error:
        said = str(error).removeprefix("the ")
        raise UserError(f"{where}: the {role} {said}") from error
    if isinstance(image, str) and image:
        return Item(text, (resolve_image(image, root=image_root, where=f"{where}, {role}"),))
    return Item(text, (image,) if image else ())


def collect(
    rows: Iterable[tuple[str, _Row]],
    parse: Callable[[str, _Row], Pair],
    *,
    source: str,
    on_bad_row: OnBadRow,
    duplicates: OnDuplicate = "bad",
) -> PairTable:
    """Parse named rows into pairs.

    Args:
        duplicates: a row whose query and positive occurred before is a bad row (`"bad"`), or is
            left out and counted in the log (`"drop"`), because published corpora hold such rows.

    Raises:
        UserError: a bad row under `on_bad_row="fail"`, or no usable row at all.
    """
    check_on_bad_row(on_bad_row)
    skipped: list[str] = []
    repeated: list[str] = []

    def good_pairs() -> Iterator[Pair]:
        first_seen: dict[tuple[int, int], str] = {}
        for row_id, row in rows:
            try:
                pair = parse(row_id, row)
                first = first_seen.setdefault((pair.query.key, pair.positive.key), row_id)
                if first is not row_id and duplicates == "drop":
                    repeated.append(f"{row_id} as {first}")
                    continue
                if first is not row_id:
                    raise UserError(
                        f"{row_id}: same query and positive as {first}; "
                        "remove one, or set on_bad_row=skip"
                    )
            except UserError as error:
                if on_bad_row == "fail":
                    raise
                skipped.append(str(error))
            else:
                yield pair

    pairs = PairTable.of(good_pairs())
    log_skipped(skipped, source=source)
    if repeated:
        shown = "; ".join(repeated[:_SHOWN_ROWS]) + ("; ..." if repeated[_SHOWN_ROWS:] else "")
        _log.info(
            "%s: left out %d repeated row(s): %s",
            source,
            len(repeated),
            shown,
            extra={"repeated": repeated},
        )
    if not pairs:
        raise UserError(f"{source}: no usable row ({len(skipped)} skipped); training needs data")
    return pairs


def distinct_texts(pairs: Iterable[Pair]) -> list[str]:
    """All distinct texts of the pairs without image slots, sorted."""
    items = (item for pair in pairs for item in (pair.query, pair.positive, *pair.negatives))
    return sorted({item.text.replace(IMAGE_SLOT, "") for item in items})


def check_on_bad_row(value: str) -> None:
    """Refuse anything but the two known choices."""
    if value not in ("fail", "skip"):
        raise UserError(f"on_bad_row is {value!r}; choose fail or skip")


def log_skipped(messages: list[str], *, source: str) -> None:
    """One warning for all rows skipped in `source`, with the first few spelt out."""
    if messages:
        shown = "; ".join(messages[:_SHOWN_ROWS]) + ("; ..." if messages[_SHOWN_ROWS:] else "")
        # All of them, for a listener such as `cocoa doctor`.
        extra = {"complaints": messages}
        _log.warning("%s: skipped %d bad row(s): %s", source, len(messages), shown, extra=extra)
