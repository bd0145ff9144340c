"""Parquet, JSON and JSONL files as sequences of `Pair`s, which are made when they are asked for.

`datasets` keeps a file's rows in Arrow on disk, memory-mapped and so shared by all processes;
beside them a row costs 18 bytes.
"""

from __future__ import annotations

import glob
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.rows import OnBadRow, RowFormat, log_repeated, log_skipped
from cocoa_pl.errors import UserError, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # with a branch, tag or commit
Repeated = Literal["bad", "drop"]

# A file of JSON is one column of texts, which are parsed when their row is asked for. So a row of
# another shape than its neighbours, or of no JSON at all, is a bad row and not a bad file.
_JSON = datasets.Features({"a row as JSON": datasets.Value("large_string")})
_JSON_COLUMN = next(iter(_JSON))
_LINES = {
    "path": "text",
    "features": _JSON,
    "encoding": "utf-8-sig",
    "encoding_errors": "backslashreplace",  # no JSON string holds \\x: such a row is refused
}
_BLOCK = 100  # rows in memory together; they may hold images


def find_files(root: Path, pattern: str, *, source: str) -> list[Path]:
    """The files that a pattern names below a folder, in name order; at least one."""
    if (root / pattern).is_file():
        return [root / pattern]
    if found := sorted(glob.glob(pattern, root_dir=root)):
        return [root / name for name in found]
    folder = (root / pattern).parent
    while root in folder.parents and not folder.is_dir():
        folder = folder.parent
    has = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise UserError(
        f"{source}: there is no {root / pattern}; {folder} "
        f"{'has ' + ', '.join(has) if has else 'is no folder with files'}; check root and split"
    )


def open_file(path: Path, form: RowFormat) -> datasets.Dataset:
    """The rows of a file as they stand there, with the columns that the format names.

    Raises:
        UserError: for a file that is of no known kind, cannot be read, or lacks columns.
    """
    kinds: dict[str, Any] = {".parquet": _open_parquet, ".jsonl": _open_lines, ".json": _open_array}
    if path.suffix not in kinds:
        raise UserError(
            f"{path}: files ending in {path.suffix!r} are not read; use .jsonl, .json or .parquet"
        )
    try:
        rows: datasets.Dataset = kinds[path.suffix](path, form)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:]} ({reason:.200}); get the file again, or "
            "set HF_DATASETS_CACHE to a folder with room if that is the reason"
        ) from error
    return rows


def open_stream(
    root: str, patterns: Sequence[str], form: RowFormat, *, source: str
) -> datasets.IterableDataset:
    """The rows of files below a folder, or of a data set of the hub, read when they are their turn.

    There are as many shards as parquet files have row groups.

    Raises:
        UserError: if they cannot be reached, or lack columns.
    """
    is_local = Path(root).is_dir() or not HUB_ID.fullmatch(root)
    folder = glob.escape(root) if is_local else f"hf://datasets/{root}"
    files = [f"{folder}/{pattern}" for pattern in patterns]
    kind: dict[str, Any] = _LINES if files[0].endswith(".jsonl") else {"path": "parquet"}
    try:
        rows = datasets.load_dataset(data_files=files, split="train", streaming=True, **kind)
        rows = rows.reshard()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{source}: cannot stream {', '.join(patterns)} of {root} ({first_line(error):.200}); "
            "check the name, the network, or fetch it with: "
            f"hf download {root} --repo-type dataset --local-dir FOLDER"
        ) from error
    names = rows.column_names or []
    if _JSON_COLUMN in names:
        return rows.with_format("arrow")
    form.columns_of(dict.fromkeys(names), f"{source}: {', '.join(patterns)} of {root}")
    return rows.select_columns([n for n in names if n in form.names]).with_format("arrow")


def _open_parquet(path: Path, form: RowFormat) -> datasets.Dataset:
    about = pq.read_metadata(path)
    names = about.schema.to_arrow_schema().names
    form.columns_of(dict.fromkeys(names), str(path))
    if not about.num_rows:  # which the builder refuses
        return datasets.Dataset.from_dict({})
    return datasets.load_dataset(
        "parquet",
        data_files=glob.escape(str(path)),
        split="train",
        columns=[name for name in names if name in form.names],
    )


def _open_lines(path: Path, form: RowFormat) -> datasets.Dataset:
    if not path.stat().st_size:
        return datasets.Dataset.from_dict({})
    return datasets.load_dataset(data_files=glob.escape(str(path)), split="train", **_LINES)


def _open_array(path: Path, form: RowFormat) -> datasets.Dataset:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array ({first_line(error)})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a JSON array of objects, but {type(rows).__name__}")
    texts = {_JSON_COLUMN: [json.dumps(row) for row in rows]}
    return datasets.Dataset.from_dict(texts, features=_JSON)


def as_row(columns: dict[str, Any]) -> object:
    """What a format makes a pair of: the columns, or what a row's JSON holds, or its bytes."""
    if _JSON_COLUMN not in columns:
        return columns
    try:
        return json.loads(columns[_JSON_COLUMN])
    except (ValueError, RecursionError):
        return columns[_JSON_COLUMN].encode()


class FileRows(Sequence[Pair]):
    """A file's rows.

    Args:
        label, first: row n is called `label {first + n}` in messages.
    """

    def __init__(
        self, data: datasets.Dataset, form: RowFormat, subset: str, label: str, *, first: int = 0
    ) -> None:
        self.data = data
        self.form = form
        self.subset = subset
        self.label, self.first = label, first

    def row_id(self, number: int) -> str:
        return f"{self.label} {self.first + number}"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: Any) -> Any:
        """The row's pair; a row that is none was left out by `read`."""
        row = as_row({name: column[number].as_py() for name, column in self._columns})
        return self.form.pair(row, row_id=self.row_id(number), subset=self.subset, is_known=True)

    def contents(self) -> Iterator[object]:
        """All rows as they stand there."""
        for start in range(0, len(self), _BLOCK):
            yield from map(as_row, self.data.data.fast_slice(start, _BLOCK).to_pylist())

    @cached_property
    def digest(self) -> bytes:
        """Of all content, however it is cut into chunks and files."""
        table = self.data.data
        digest = xxhash.xxh3_128(str(table.schema.remove_metadata()).encode())
        for start in range(0, len(self), _BLOCK):
            block = table.fast_slice(start, _BLOCK)
            # Taken rows lie in buffers of their own, whatever lay around them.
            block = block.take(np.arange(len(block))).combine_chunks()
            for batch in block.to_batches():
                digest.update(batch.serialize())
        return digest.digest()

    @cached_property
    def _columns(self) -> list[tuple[str, pa.ChunkedArray]]:
        table = self.data.data
        return [(name, table.column(name)) for name in table.column_names]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_columns"}


class Pairs(Sequence[Pair]):
    """The good rows of some files.

    Attributes:
        numbers: int64 [N], rows counted over all parts.
        groups: int64 [N], the `group_key` of each.
        has_media: bool [N, 2], whether a row's query and whether its positive holds media.
    """

    def __init__(
        self,
        parts: Sequence[FileRows],
        numbers: np.ndarray,
        groups: np.ndarray,
        has_media: np.ndarray,
    ) -> None:
        self.parts = tuple(parts)
        self.numbers, self.groups, self.has_media = numbers, groups, has_media
        self._starts = list(accumulate(map(len, parts), initial=0))

    @classmethod
    def joined(cls, several: Sequence[Pairs]) -> Pairs:
        """The rows of all, one after the other."""
        sizes = [sum(map(len, pairs.parts)) for pairs in several]
        starts = accumulate(sizes, initial=0)
        numbers = [pairs.numbers + start for pairs, start in zip(several, starts, strict=False)]
        return cls(
            [part for pairs in several for part in pairs.parts],
            np.concatenate([np.empty(0, np.int64), *numbers]),
            np.concatenate([np.empty(0, np.int64), *(pairs.groups for pairs in several)]),
            np.concatenate([np.empty((0, 2), bool), *(pairs.has_media for pairs in several)]),
        )

    def select(self, rows: np.ndarray) -> Pairs:
        """The rows at these positions, in this order."""
        return Pairs(self.parts, self.numbers[rows], self.groups[rows], self.has_media[rows])

    def subset_codes(self) -> tuple[list[str], np.ndarray]:
        """Names of the subsets in order of occurrence, and int32 [N], each row's place there."""
        parts, first, part = np.unique(self._parts_of(), return_index=True, return_inverse=True)
        names = list(dict.fromkeys(self.parts[parts[at]].subset for at in np.argsort(first)))
        codes = np.array([names.index(self.parts[one].subset) for one in parts], dtype=np.int32)
        return names, codes[part]

    @cached_property
    def fingerprint(self) -> str:
        """Of the content of the files, of which rows are used in which order, and as what.

        Images that are files of their own are not looked at, and it does not matter where the
        folder lies.
        """
        digest = xxhash.xxh3_128(self.numbers.tobytes())
        for part in self.parts:
            digest.update(repr((part.subset, part.form.columns)).encode() + part.digest)
        return digest.hexdigest()

    def row_id(self, position: int) -> str:
        part, row = self._place(position)
        return part.row_id(row)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> Pairs: ...

    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        part, row = self._place(index)
        pair: Pair = part[row]
        return pair

    def _parts_of(self) -> np.ndarray:
        return np.searchsorted(self._starts, self.numbers, side="right") - 1

    def _place(self, position: int) -> tuple[FileRows, int]:
        number = int(self.numbers[position])
        part = bisect_right(self._starts, number) - 1
        return self.parts[part], number - self._starts[part]


def read_files(
    files: Mapping[str, Sequence[Path]],
    form: RowFormat,
    *,
    subset: str,
    max_rows: int | None,
    on_bad_row: OnBadRow,
    repeated: Repeated,
) -> Pairs:
    """The good rows of a subset.

    Args:
        files: what rows are called in messages, where they are numbered through -> their files.
        max_rows: of each of these, the first so many; None for all.
    """
    parts = []
    for name, several in files.items():
        count = 0
        for file in several:
            rows = open_file(file, form)
            if max_rows is not None:
                rows = rows.select(range(min(len(rows), max_rows - count)))
            is_lines = file.suffix == ".jsonl"  # which editors count from 1
            label = f"{name} line" if is_lines else f"{name} row"
            parts.append(FileRows(rows, form, subset, label, first=count + is_lines))
            count += len(rows)
    return read(parts, source=", ".join(files), on_bad_row=on_bad_row, repeated=repeated)


def read(
    parts: Sequence[FileRows], *, source: str, on_bad_row: OnBadRow, repeated: Repeated
) -> Pairs:
    """Look at every row once, and keep which of them are pairs.

    Args:
        repeated: a row whose query and positive occurred before is a bad row (`bad`), or is left
            out and counted in the log (`drop`), because published corpora hold such rows.

    Raises:
        UserError: a bad row under `on_bad_row="fail"`, or no usable row at all.
    """
    numbers, groups, identities, media = array("q"), array("q"), array("q"), array("b")
    skipped: list[str] = []
    start = 0
    for part in parts:
        for number, row in enumerate(part.contents()):
            if isinstance(row, bytes) and not row.strip():  # a blank line of JSONL
                continue
            try:
                pair = part.form.pair(row, row_id=part.row_id(number), subset=part.subset)
            except UserError as error:
                if on_bad_row == "fail":
                    raise
                skipped.append(str(error))
                continue
            numbers.append(start + number)
            groups.append(group_key(pair))
            identities.append(hash((pair.query.key, pair.positive.key)))
            media.extend((bool(pair.query.media), bool(pair.positive.media)))
        start += len(part)
    has_media = np.array(media, dtype=bool).reshape(-1, 2)
    pairs = Pairs(parts, np.array(numbers), np.array(groups), has_media)
    _, first, same = np.unique(identities, return_index=True, return_inverse=True)
    is_new = first[same] == np.arange(len(pairs))
    again = [
        (pairs.row_id(row), pairs.row_id(int(first[same[row]])))
        for row in np.flatnonzero(~is_new).tolist()
    ]
    if repeated == "drop":
        log_repeated([f"{row} as {earlier}" for row, earlier in again], source=source)
    for row, earlier in again if repeated == "bad" else ():
        skipped.append(
            f"{row}: same query and positive as {earlier}; remove one, or set on_bad_row=skip"
        )
        if on_bad_row == "fail":
            raise UserError(skipped[-1])
    pairs = pairs.select(is_new) if again else pairs
    log_skipped(skipped, source=source)
    if not pairs:
        raise UserError(f"{source}: no usable row ({len(skipped)} skipped); training needs data")
    return pairs


def group_key(pair: Pair) -> int:
    """What rows have in common that must not be split between training and validation: the image,
    or else the query.
    """
    media = pair.query.media or pair.positive.media
    return Item(IMAGE_SLOT, media[:1]).key if media else pair.query.key


def subset_codes(pairs: Sequence[Pair]) -> tuple[list[str], np.ndarray]:
    """Names of the subsets in order of occurrence, and int32 [N], each row's place among them."""
    if isinstance(pairs, Pairs):
        return pairs.subset_codes()
    places: dict[str, int] = {}
    codes = [places.setdefault(pair.subset, len(places)) for pair in pairs]
    return list(places), np.array(codes, dtype=np.int32)


def has_media(pairs: Sequence[Pair]) -> np.ndarray:
    """bool [N, 2]: whether a row's query and whether its positive holds media."""
    if isinstance(pairs, Pairs):
        return pairs.has_media
    held = [(bool(pair.query.media), bool(pair.positive.media)) for pair in pairs]
    return np.array(held, dtype=bool).reshape(-1, 2)


def select(pairs: Sequence[Pair], rows: np.ndarray) -> Sequence[Pair]:
    """The pairs at these positions: `Pairs` of `Pairs`, a list of anything else."""
    if isinstance(pairs, Pairs):
        return pairs.select(rows)
    return [pairs[row] for row in rows.tolist()]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Of all content in its order; of images that are files of their own, the paths."""
    if isinstance(pairs, Pairs):
        return pairs.fingerprint
    items = (item for pair in pairs for item in (pair.query, pair.positive, *pair.negatives))
    return xxhash.xxh3_128(repr([item.key for item in items]).encode()).hexdigest()
