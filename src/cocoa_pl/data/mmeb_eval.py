"""MMEB's evaluation folders, version 1 and 2, as `EvalSubset`s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cocoa_pl.data.candidate_rows import CandidateRows, CandidateTable
from cocoa_pl.data.images import embedded
from cocoa_pl.data.inputs import PLACEHOLDER
from cocoa_pl.data.mmeb import EvalSubset
from cocoa_pl.data.rows import OnBadRow, check_on_bad_row, log_skipped, make_item
from cocoa_pl.data.tables import check_type, find_parquet, is_image, is_list, read_batches
from cocoa_pl.errors import UserError
from cocoa_pl.items import Item


class SubsetInfo(TypedDict):
    """What a benchmark's table says about a subset; `reader` is a name in `READERS`."""

    group: str
    in_distribution: bool
    reader: NotRequired[str]


class MmebBenchmark:
    """Evaluation subsets in MMEB's layout: V1's columns, or V2's where the table names readers.

    Args:
        name: of the benchmark, in results.
        root: folder with one folder of parquet files for each subset.
        image_root: folder that the rows' image paths are relative to.
        split: which files of a subset to read, `<split>-*.parquet`.
        table: subset -> its group, and whether its training data is in the training set.
        subsets: the ones to score, all of the table if None; means over a choice are not reported.
        published: rows of papers to stand beside (`evaluation.published`); empty for none.

    Raises:
        UserError: for an unknown subset or reader.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str,
        image_root: str,
        split: str,
        table: Mapping[str, SubsetInfo],
        subsets: Sequence[str] | None,
        published: Sequence[Mapping[str, object]],
        on_bad_row: OnBadRow,
    ) -> None:
        if isinstance(subsets, str):
            raise UserError(f"benchmark.subsets is a list; write benchmark.subsets=[{subsets}]")
        if subsets is not None and not subsets:
            raise UserError("benchmark.subsets is empty; name some, or set it to null for all")
        if unknown := [subset for subset in subsets or () if subset not in table]:
            raise UserError(
                f"benchmark.subsets names {unknown[0]}, but {name} has {', '.join(table)}"
            )
        for subset, info in table.items():
            if info.get("reader", next(iter(READERS))) not in READERS:
                raise UserError(
                    f"benchmark.table.{subset}.reader is {info['reader']}; "
                    f"choose {', '.join(READERS)}"
                )
        self.name = name
        self.root = Path(root)
        self.image_root = Path(image_root)
        self.split = split
        self.table = {s: info for s, info in table.items() if subsets is None or s in subsets}
        self.is_partial = len(self.table) < len(table)
        self.published = published
        self.on_bad_row = on_bad_row

    def subsets(self) -> list[EvalSubset]:
        """The subsets in the table's order; one that is missing is an error."""
        return [
            read_eval_subset(
                self.root,
                subset=subset,
                split=self.split,
                image_root=self.image_root,
                group=info["group"],
                in_distribution=info["in_distribution"],
                on_bad_row=self.on_bad_row,
                reader=READERS[info["reader"]] if "reader" in info else None,
            )
            for subset, info in self.table.items()
        ]


def read_eval_subset(
    root: Path,
    *,
    subset: str,
    split: str,
    image_root: Path,
    group: str,
    in_distribution: bool,
    on_bad_row: OnBadRow,
    reader: Reader | None = None,
) -> EvalSubset:
    """One evaluation subset: `qry_text`, `qry_img_path`, and lists `tgt_text`, `tgt_img_path`.

    Args:
        reader: how the newer annotations with instructions are turned into these columns; None for
            files that hold them.

    Memory grows with the number of distinct texts, images and candidate lists, not with rows x
    candidates. A row with one unusable candidate is a bad row.

    Raises:
        UserError: no such folder, file or column, no usable row, or a bad row (`on_bad_row`).
    """
    check_on_bad_row(on_bad_row)
    queries, candidates = SideTable(role="query"), SideTable(role="candidate")
    row_ids, query_index, candidate_index, bad_rows = number_rows(
        root, subset=subset, split=split, queries=queries, candidates=candidates, reader=reader
    )
    query_items = queries.build(image_root=image_root)
    items = candidates.build(image_root=image_root)
    for row, row_id in enumerate(row_ids):
        complaint = queries.complaint(query_index[[row]], row_id=row_id) or candidates.complaint(
            candidate_index[row], row_id=row_id
        )
        if complaint:
            bad_rows.setdefault(row, complaint)
    if bad_rows and on_bad_row == "fail":
        raise UserError(bad_rows[min(bad_rows)])
    log_skipped([bad_rows[row] for row in sorted(bad_rows)], source=subset)
    good = [row for row in range(len(row_ids)) if row not in bad_rows]
    if not good:
        raise UserError(f"{subset}: no usable row in {root / subset} ({len(bad_rows)} skipped)")
    kept_queries, query_rank = _keep_used(query_items, [query_index[good]])
    good_rows = candidate_index.select(good)
    kept, rank = _keep_used(items, good_rows.lists)
    return EvalSubset(
        name=subset,
        group=group,
        in_distribution=in_distribution,
        queries=kept_queries,
        candidates=kept,
        query_index=query_rank[query_index[good]],
        candidate_index=good_rows.renumbered(rank),
        row_ids=[row_ids[row] for row in good],
    )


def _keep_used(
    items: list[Item | None], index: Sequence[np.ndarray]
) -> tuple[list[Item], np.ndarray]:
    """The items that `index` names, and int32 [len(items)]: number -> position among them."""
    used = np.zeros(len(items), dtype=bool)
    for numbers in index:
        used[numbers] = True
    kept = [item for item, wanted in zip(items, used, strict=True) if wanted and item is not None]
    assert len(kept) == used.sum(), "a row with an unusable side was kept"
    return kept, (np.cumsum(used) - 1).astype(np.int32)


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


@dataclass(frozen=True)
class Reader:
    """How the rows of a meta-task are read.

    Args:
        query_image: the query holds an image.
        strips_instruction: of blanks on both sides; a line break then parts it from the image.
        query_end: behind the query.
        target_image: the candidates are images, with captions where the first one has one.
        target_end: behind a candidate without a caption; with one it is a line break.
        name_has_caption: candidates of one image are told apart by their captions.
    """

    query_image: bool
    strips_instruction: bool
    query_end: str
    target_image: bool
    target_end: str
    name_has_caption: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it needs; others may be missing or hold anything."""
        query_image = ("qry_img_path",) if self.query_image else ()
        target_image = ("tgt_inst", "tgt_img_path") if self.target_image else ()
        return ("qry_inst", "qry_text", *query_image, "tgt_text", *target_image)


def _finds_texts(*, strips_instruction: bool) -> Reader:
    return Reader(
        query_image=True,
        strips_instruction=strips_instruction,
        query_end="\n",
        target_image=False,
        target_end="",
        name_has_caption=False,
    )


def _finds_images_by_text(*, query_end: str) -> Reader:
    return Reader(
        query_image=False,
        strips_instruction=False,
        query_end=query_end,
        target_image=True,
        target_end="\n",
        name_has_caption=False,
    )


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "classification": _finds_texts(strips_instruction=False),
        "vqa": _finds_texts(strips_instruction=True),
        "i2t": _finds_texts(strips_instruction=False),
        "t2i": _finds_images_by_text(query_end="\n"),
        "dialogue_t2i": _finds_images_by_text(query_end="\n\n"),
        "i2i": Reader(
            query_image=True,
            strips_instruction=True,
            query_end="\n",
            target_image=True,
            target_end="",
            name_has_caption=True,
        ),
    }
)


def as_plain(batch: pa.RecordBatch, reader: Reader) -> tuple[pa.RecordBatch, pa.Array | None]:
    """V1's four columns, and the name of every candidate, flat; None if the text alone is the name.

    Args:
        batch: the reader's columns without nulls; a row's lists are of one length.
    """
    offsets = batch["tgt_text"].offsets
    targets, images, names = batch["tgt_text"].flatten(), None, None
    if reader.target_image:
        captions, images = targets, batch["tgt_img_path"].flatten()
        targets = _image_targets(batch, captions, reader)
        names = images
        if reader.name_has_caption:
            names = _join(images, ":", pc.utf8_trim(captions, characters='"'))
    else:
        images = pa.array([""] * len(targets), pa.string())
    return (
        pa.RecordBatch.from_arrays(
            [
                _queries(batch, reader),
                batch["qry_img_path"] if reader.query_image else pa.array([""] * len(batch)),
                pa.ListArray.from_arrays(_from_zero(offsets), _string(targets)),
                pa.ListArray.from_arrays(_from_zero(offsets), _string(images)),
            ],
            names=["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"],
        ),
        names,
    )


def _queries(batch: pa.RecordBatch, reader: Reader) -> pa.Array:
    instruction, text = _string(batch["qry_inst"]), _string(batch["qry_text"])
    if not reader.query_image:
        return _join(instruction, " ", text, reader.query_end)
    instruction = pc.replace_substring(instruction, PLACEHOLDER, "")
    if reader.strips_instruction:
        instruction = _join("\n", pc.utf8_trim_whitespace(instruction))
    prompt = pc.if_else(pc.equal(text, ""), instruction, _join(instruction, " ", text))
    return _join(_tight(_join(PLACEHOLDER, " ", prompt)), reader.query_end)


def _image_targets(batch: pa.RecordBatch, captions: pa.Array, reader: Reader) -> pa.Array:
    """The text beside each candidate image."""
    lists = batch["tgt_text"]
    no_captions = pa.scalar([""], lists.type)
    is_empty = pc.equal(pc.list_value_length(lists), 0)
    first = pc.list_element(pc.if_else(is_empty, no_captions, lists), 0)
    has_captions = pc.not_equal(pc.utf8_trim_whitespace(first), "")
    instruction = pc.replace_substring(_string(batch["tgt_inst"]), PLACEHOLDER, "")
    row = pc.list_parent_indices(lists)
    instruction, has_captions = instruction.take(row), has_captions.take(row)
    with_caption = _join(_tight(_join(PLACEHOLDER, " ", instruction, " ", captions)), "\n")
    alone = _join(_tight(_join(PLACEHOLDER, " ", instruction)), reader.target_end)
    return pc.if_else(has_captions, with_caption, alone)


def _join(*parts: pa.Array | str) -> pa.Array:
    strings = [part if isinstance(part, str) else _string(part) for part in parts]
    return pc.binary_join_element_wise(*strings, "")


def _tight(texts: pa.Array) -> pa.Array:
    """No blank in front of a line break, as in V1."""
    return pc.replace_substring(texts, " \n", "\n")


def _string(values: pa.Array) -> pa.Array:
    return values.cast(pa.string())


def _from_zero(offsets: pa.Array) -> pa.Array:
    """Offsets of a slice, counted from its own first value."""
    return pc.subtract(offsets, offsets[0]).cast(pa.int32())
