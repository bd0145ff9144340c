"""What the columns of a row mean: a mapping from YAML makes a `Pair` of a row of any corpus."""

from __future__ import annotations

import ast
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from cocoa_pl.data.images import embedded, resolve_image
from cocoa_pl.data.items import PLACEHOLDER, Item, Medium, Pair, placed
from cocoa_pl.errors import UserError, visible

OnBadRow = Literal["fail", "skip"]
Repeated = Literal["bad", "drop"]
Columns = Mapping[str, Any]

_ANY_PLACEHOLDER = re.compile(r"<\|image_\d+\|>|<image>")
_SHOWN_ROWS = 3
KEPT = 1000  # errors of a kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowFormat:
    """What the columns of a row mean, and what becomes of a row that cannot be used.

    Args:
        columns: mappings, of which the first counts whose `required` columns a row has. Each says
            for `query`, `positive` and, if there are any, `negative` which column holds the `text`
            and which the `image`. A column of negatives holds an entry for each in a list, or in a
            list that is written as a string, or the only one; `negatives.text` is the key `text` of
            each object in the list `negatives`.
        image_root: folder that image paths are relative to.
        images_placed: the texts of queries and positives must say where their images stand, instead
            of images coming first.
        other_columns: a row may have columns that no mapping names.
        drop_orphan_slots: take `<|image_1|>` out of texts that have no image instead of refusing
            the row; MoCa-CL-Pairs and mmE5's files hold such rows.
        on_bad_row: a row that cannot be used ends the run (`fail`), or is left out and counted in
            the log (`skip`).
        repeated: a row whose query and positive occurred before cannot be used (`bad`), or is left
            out and counted in the log (`drop`), because published corpora hold such rows.
    """

    columns: Sequence[Columns]
    image_root: Path
    images_placed: bool
    other_columns: bool
    drop_orphan_slots: bool
    on_bad_row: OnBadRow
    repeated: Repeated

    @cached_property
    def names(self) -> list[str]:
        """All columns that the mappings name."""
        sides = [one[role] for one in self.columns for role in one if role != "required"]
        return list(dict.fromkeys(name.partition(".")[0] for s in sides for name in s.values()))

    def columns_of(self, names: Mapping[str, object], *, file: str = "") -> Columns:
        """The mapping for a row, or all rows of a file, with these columns.

        Raises:
            UserError: for a column that is missing, or unknown where that matters.
        """
        where = f"{file}: " if file else ""
        if not self.other_columns and (unknown := [n for n in names if n not in self.names]):
            raise UserError(
                f"{where}unknown column {', '.join(map(str, unknown))}; "
                f"known are {', '.join(self.names)}",
                file=file,
            )
        for columns in self.columns:
            if all(name in names for name in columns["required"]):
                return columns
        needed = ", or ".join(" and ".join(columns["required"]) for columns in self.columns)
        has = ", ".join(map(str, names)) or "none"
        raise UserError(f"{where}the columns {needed} are needed; it has {has}", file=file)

    def checked(self, row: object, *, row_id: str, subset: str) -> Pair | UserError:
        """The row as a pair, or what is wrong with it where such rows are skipped."""
        try:
            return self.pair(row, row_id=row_id, subset=subset)
        except UserError as error:
            if self.on_bad_row == "fail":
                raise
            return copy(error)  # without the frames that it came through, which hold the row

    def pair(self, row: object, *, row_id: str, subset: str, is_known: bool = False) -> Pair:
        """The row as a pair.

        Args:
            row: its columns; the bytes of what is no JSON.
            is_known: this row was a pair before, so its files are not looked for again.

        Raises:
            UserError: with `row_id`, for a row that cannot be used.
        """
        try:
            if isinstance(row, bytes):
                raise UserError(f"not valid JSON: {row[:60]!r}; write one object a line, in UTF-8")
            if not isinstance(row, dict):
                raise UserError(f"a row must be an object, found {type(row).__name__}")
            columns = self.columns_of(row)
            sides = [
                (role, row.get(columns[role].get("text")), row.get(columns[role].get("image")))
                for role in ("query", "positive")
            ]
            sides += [("negative", *side) for side in _negatives(row, columns.get("negative", {}))]
            query, positive, *negatives = [
                make_item(
                    text,
                    image,
                    role=role,
                    image_root=self.image_root,
                    # MMEB's own negatives name images without a placeholder.
                    add_missing_slot=role == "negative" or not self.images_placed,
                    drop_orphan_slot=self.drop_orphan_slots,
                    is_known=is_known,
                )
                for role, text, image in sides
            ]
        except UserError as error:
            error.row_id, error.kind = row_id, error.kind or "bad_row"
            raise
        return Pair(query, positive, tuple(negatives), subset, row_id)


def make_item(
    text: object,
    image: object,
    *,
    role: str,
    image_root: Path,
    add_missing_slot: bool,
    drop_orphan_slot: bool = False,
    is_known: bool = False,
) -> Item:
    """One side of a row as an `Item`; None, `""` and `[]` mean "no text" or "no image".

    Args:
        image: a path below `image_root`, the bytes of an encoded image, what `datasets` makes of
            one, `{"bytes", "path"}`, or a list of these.
        add_missing_slot: put images without a placeholder in front of the text, instead of
            refusing them.
        drop_orphan_slot: take a placeholder without an image out of the text, instead of refusing
            it.
        is_known: do not look for image files.

    An image file must exist; it is opened only when its pixels are needed.

    Raises:
        UserError: with `role`, what is wrong and what to do.
    """
    values = image if isinstance(image, list) else (image,)
    images = [one for one in map(embedded, values) if one]
    if drop_orphan_slot and not images and isinstance(text, str):
        text = text.replace(PLACEHOLDER, "")
    try:
        if not is_known:
            _check_side(text, images, is_placed=not add_missing_slot)
        text = placed(cast(str, text or ""), len(images))
        return Item(text, tuple(_medium(one, image_root, is_known) for one in images))
    except UserError as error:
        error.role = role
        raise


def _check_side(text: object, images: Sequence[object], *, is_placed: bool) -> None:
    wrong = [one for one in images if not isinstance(one, str | bytes)]
    if not isinstance(text, str | None) or wrong:
        kind = type(wrong[0] if wrong else text).__name__
        raise UserError(
            "it must be a text (a string) and an image (a path, bytes, {bytes, path} or a list of "
            f"these), empty for none; found {kind}"
        )
    text = text or ""
    if not images and not text.strip():
        raise UserError("it is empty: it has neither text nor an image", kind="empty_text")
    if images and is_placed and not _ANY_PLACEHOLDER.search(text):
        named = images[0] if isinstance(images[0], str) else "in the row"
        raise UserError(
            f"it has image {named!r:.200} but no {PLACEHOLDER} in its text; write the placeholder "
            "where the image belongs",
            kind="placeholder_mismatch",
        )


def _medium(value: Any, root: Path, is_known: bool) -> Medium:
    """What a row holds as a medium: encoded bytes, or a file below the root."""
    if isinstance(value, bytes):
        return value
    if value.startswith(os.sep):  # CoCoA's scripts write some so
        folder = str(root.absolute())
        inside = value.startswith(folder + os.sep)
        value = os.path.relpath(value, folder) if inside else value
    if is_known:
        return Path(f"{root}/{value}")
    return resolve_image(value, root=root)


class RowErrors(list[UserError]):
    """What is wrong with rows: of each kind the first 1000 errors, and the number of all.

    An error takes 600 bytes, and a corpus may lack a million images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()  # of each kind

    def add(self, error: UserError) -> None:
        self.counts[error.kind] += 1
        if self.counts[error.kind] <= KEPT:
            self.append(error)

    def join(self, errors: Iterable[UserError]) -> None:
        for error in errors:
            self.add(error)
        if isinstance(errors, RowErrors):
            self.counts.update({kind: n - KEPT for kind, n in errors.counts.items() if n > KEPT})

    def log(self, *, source: str) -> None:
        """One line for all rows of `source` that cannot be used, and one for those that repeat
        another, with the first few spelt out.
        """
        repeated = {"repeated_row"}
        for what, kinds, level in (
            ("bad", self.counts.keys() - repeated, logging.WARNING),
            ("repeated", self.counts.keys() & repeated, logging.INFO),
        ):
            if count := sum(self.counts[kind] for kind in kinds):
                some = [str(error) for error in self if error.kind in kinds]
                shown = "; ".join(some[:_SHOWN_ROWS]) + "; ..." * (count > _SHOWN_ROWS)
                log.log(level, "%s: skipped %d %s row(s): %s", visible(source), count, what, shown)


def _negatives(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> Iterator[tuple[object, object]]:
    """Text and image of each hard negative."""
    text, image = columns.get("text", ""), columns.get("image", "")
    texts, images = _entries(row, text, columns), _entries(row, image, columns)
    # A missing column, null, "" and [] mean "none of these"; anything else must match one by one.
    if not any(texts):
        texts = [""] * len(images)
    if not any(images):
        images = [""] * len(texts)
    if len(texts) != len(images):
        raise UserError(
            f"{text} has {len(texts)} entries and {image} {len(images)}; give one path (or an "
            "empty string) for each text"
        )
    for one in zip(texts, images, strict=True):
        # In columns of their own, an entry with neither is absent, not empty.
        if any(one) or "." in text + image:
            yield one


def _entries(row: Mapping[str, Any], column: str, columns: Mapping[str, str]) -> list[object]:
    """A list, a Python list written as a string, or a single value; of the column `negatives.text`
    the key `text` of each object in the list `negatives`.
    """
    name, _, key = column.partition(".")
    value = row.get(name)
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            value = ast.literal_eval(value.strip())  # parses, and executes nothing
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(
                f"{name} looks like a list but is not one of quoted strings: {value[:80]!r}; "
                "write strings only"
            ) from error
    entries = value if isinstance(value, list) else [value] if value else []
    if not key:
        return [embedded(entry) or "" for entry in entries]
    known = [one.partition(".")[2] for one in columns.values()]
    for entry in entries:
        if not isinstance(entry, dict) or not entry.keys() <= set(known):
            raise UserError(
                f"{name} must be a list of {{{', '.join(known)}}} objects, found {entry!r:.80}"
            )
    return [entry.get(key) for entry in entries]
