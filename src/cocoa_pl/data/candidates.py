"""Evaluation rows in, each distinct text-and-image combination numbered once and one `Item` out.

1000 rows x 1000 candidates name a few thousand distinct ones; only those become Python objects.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cocoa_pl.data.candidate_rows import CandidateRows, CandidateTable
from cocoa_pl.data.images import embedded
from cocoa_pl.data.instructed import Reader, as_plain
from cocoa_pl.data.rows import make_item
from cocoa_pl.data.tables import check_type, find_parquet, is_image, is_list, read_batches
from cocoa_pl.errors import UserError
from cocoa_pl.items import Item

_EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")

# Rows held as strings at a time: 64 rows x 1000 candidates are a few megabytes.
_BATCH_ROWS = 64


class SideTable:
    """Distinct (text, image path) combinations, numbered in the order in which they are first met.

    `role` says in messages what they are: "query" or "candidate".
    """

    def __init__(self, *, role: str) -> None:
        self.role = role
        self._sides: list[tuple[str, object]] = []
        self._first_rows: list[str] = []
        self._errors: dict[int, str] = {}
        self._text_codes: dict[object, int] = {}
        self._image_codes: dict[object, int] = {}
        self._numbers: dict[int, int] = {}

    def number(
        self,
        texts: pa.Array,
        images: pa.Array,
        *,
        row_ids: np.ndarray,
        names: pa.Array | None = None,
    ) -> np.ndarray:
        """int32 [N], the number of each combination; `row_ids` [N] says which row it is from.

        With `names` it is the name that counts: later combinations of a name are the first one.
        """
        if names is not None:
            codes = _codes(names, known=self._text_codes)
        else:
            text_codes = _codes(texts, known=self._text_codes)
            codes = text_codes << 32 | _codes(images, known=self._image_codes)
        distinct, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        numbers = np.empty(len(distinct), dtype=np.int32)
        for rank in np.argsort(first):
            number = self._numbers.setdefault(int(distinct[rank]), len(self._sides))
            if number == len(self._sides):
                position = int(first[rank])
                self._sides.append((texts[position].as_py(), images[position].as_py()))
                self._first_rows.append(str(row_ids[position]))
            numbers[rank] = number
        return numbers[inverse.reshape(-1)]

    def build(self, *, image_root: Path) -> list[Item | None]:
        """All items in number order, None for unusable ones, about which there is a `complaint`."""
        return [self._build(number, image_root=image_root) for number in range(len(self._sides))]

    def complaint(self, numbers: np.ndarray, *, row_id: str) -> str | None:
        """What is wrong with the first unusable one of these combinations, said of this row."""
        if not self._errors:
            return None
        wrong = [number for number in numbers.tolist() if number in self._errors]
        if not wrong:
            return None
        message, first_row = self._errors[wrong[0]], self._first_rows[wrong[0]]
        return message if row_id == first_row else f"{row_id}: as {message}"

    def _build(self, number: int, *, image_root: Path) -> Item | None:
        text, image = self._sides[number]
        try:
            return make_item(
                text,
                image,
                role=self.role,
                where=self._first_rows[number],
                image_root=image_root,
                add_missing_slot=False,
            )
        except UserError as error:
            self._errors[number] = str(error)
            return None


def _codes(values: pa.Array, *, known: dict[object, int]) -> np.ndarray:
    """int64 [N], a number for each string or image; `known` keeps them the same over all calls."""
    if is_image(values.type):
        images = (embedded(value) for value in values.to_pylist())
        return np.array([known.setdefault(image, len(known)) for image in images], np.int64)
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    local = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
    codes: np.ndarray = np.asarray(local, dtype=np.int64)[encoded.indices.to_numpy()]
    return codes


def number_rows(
    root: Path,
    *,
    subset: str,
    split: str,
    queries: SideTable,
    candidates: SideTable,
    reader: Reader | None,
) -> tuple[list[str], np.ndarray, CandidateRows, dict[int, str]]:
    """Read a subset's rows and number their sides in `queries` and `candidates`.

    Args:
        reader: turns annotations with instructions into the plain columns; None if they are plain.

    Returns:
        Row ids; int32 [Q] query numbers; for each row int32 [C] candidate numbers; row -> message
        for those with nulls, no candidates or lists of unequal length, which count as blank.
    """
    row_ids: list[str] = []
    query_index: list[np.ndarray] = []
    table = CandidateTable()
    bad_rows: dict[int, str] = {}
    columns = _EVAL_COLUMNS if reader is None else reader.columns
    files = find_parquet(root, subset=subset, split=split)
    for batch in read_batches(files, columns=columns, optional=(), batch_size=_BATCH_ROWS):
        for name in columns:
            check_type(batch, name, source=subset, allowed=_kinds(name, reader))
        names = [f"{subset} row {len(row_ids) + offset}" for offset in range(len(batch))]
        wrong = _misshapen(batch, names=names)
        bad_rows |= {len(row_ids) + offset: message for offset, message in wrong.items()}
        row_ids += names
        if wrong:
            batch = _without_content(batch, rows=wrong)
        plain, candidate_names = (batch, None) if reader is None else as_plain(batch, reader)
        lengths = pc.list_value_length(plain["tgt_text"]).to_numpy()
        query_index.append(
            queries.number(
                plain["qry_text"], plain["qry_img_path"], row_ids=np.asarray(names, dtype=object)
            )
        )
        numbers = candidates.number(
            plain["tgt_text"].flatten(),
            plain["tgt_img_path"].flatten(),
            row_ids=np.repeat(np.asarray(names, dtype=object), lengths),
            names=candidate_names,
        )
        table.extend(np.split(numbers, np.cumsum(lengths)[:-1]))
    if not row_ids:
        raise UserError(f"{subset}: {root / subset} holds no rows; an evaluation needs data")
    return row_ids, np.concatenate(query_index), table.rows(), bad_rows


def _misshapen(batch: pa.RecordBatch, *, names: list[str]) -> dict[int, str]:
    """Messages for rows with a null, no candidates, or lists of unequal length."""
    wrong: dict[int, str] = {}
    for name in batch.schema.names:
        column = batch[name]
        # A row of embedded images has no other word for none.
        has_null = _has_null(column) and not is_image(_inner(column.type))
        for offset, value in enumerate(column.to_pylist() if has_null else []):
            if value is None or (isinstance(value, list) and None in value):
                wrong.setdefault(
                    offset, f"{names[offset]}: {name} holds a null; write an empty string for none"
                )
    text_lengths = pc.list_value_length(batch["tgt_text"]).to_pylist()
    image_lengths = text_lengths
    if "tgt_img_path" in batch.schema.names:
        image_lengths = pc.list_value_length(batch["tgt_img_path"]).to_pylist()
    for offset, (texts, images) in enumerate(zip(text_lengths, image_lengths, strict=True)):
        if texts != images:
            wrong.setdefault(
                offset,
                f"{names[offset]}: tgt_text has {texts} entries and tgt_img_path {images}; "
                "each candidate needs both (an empty string for none)",
            )
        elif not texts:
            wrong.setdefault(
                offset, f"{names[offset]}: no candidates; fill tgt_text or drop the row"
            )
    return wrong


def _has_null(column: pa.Array) -> bool:
    inner = column.flatten().null_count if is_list(column.type) else 0
    return bool(column.null_count or inner)


def _without_content(batch: pa.RecordBatch, *, rows: Iterable[int]) -> pa.RecordBatch:
    """The batch with these rows blanked: row numbers stay, and the rest is numbered at once."""
    blank: dict[str, object] = {
        field.name: [] if is_list(field.type) else None if is_image(field.type) else ""
        for field in batch.schema
    }
    bad = set(rows)
    kept = [blank if offset in bad else row for offset, row in enumerate(batch.to_pylist())]
    return pa.RecordBatch.from_pylist(kept, schema=batch.schema)


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if is_list(kind) else kind


def _kinds(column: str, reader: Reader | None) -> tuple[str, ...]:
    """What a column may hold; a reader of annotations works on paths."""
    kinds = ("string", "image") if column.endswith("img_path") and reader is None else ("string",)
    is_target = column in ("tgt_text", "tgt_img_path")
    return tuple(f"list of {kind}s" for kind in kinds) if is_target else kinds
