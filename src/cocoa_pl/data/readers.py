"""Parquet, JSON and JSONL files as rows of `datasets`, at rest or streamed."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from cocoa_pl.data.rows import RowFormat
from cocoa_pl.errors import UserError, absent, first_line, system_error

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # with a branch, tag or commit

# A file of JSON is one column of texts, which are parsed when their row is asked for. So a row of
# another shape than its neighbours, or of no JSON at all, is a bad row and not a bad file.
_JSON = datasets.Features({"a row as JSON": datasets.Value("large_string")})
_JSON_COLUMN = next(iter(_JSON))
_SHOWN_FILES = 12
_VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}  # of Polars
_LINES = {
    "path": "text",
    "features": _JSON,
    "encoding": "utf-8-sig",
    "encoding_errors": "backslashreplace",  # no JSON string holds \\x: such a row is refused
}


def find_files(root: Path, pattern: str, *, source: str) -> list[Path]:
    """The files that a pattern names below a folder, in name order; at least one."""
    if (root / pattern).is_file():
        return [root / pattern]
    if found := sorted(glob.glob(pattern, root_dir=root)):
        return [root / name for name in found]
    folder = (root / pattern).parent
    folder = folder if folder.is_dir() else root
    try:
        has = sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{source}: {system_error(error)}", file=folder) from error
    shown = ", ".join(has[:_SHOWN_FILES]) + (", ..." if has[_SHOWN_FILES:] else "")
    advice = f"{folder} {'has ' + shown if has else 'is no folder with files'}"
    raise absent(root / pattern, f"{advice}; check root and split", what=f"{source}:")


def open_file(path: Path, form: RowFormat) -> datasets.Dataset:
    """The rows of a file as they stand there, with the columns that the format names.

    Raises:
        UserError: for a file that is of no known kind, cannot be read, or lacks columns.
    """
    if path.suffix not in (".parquet", ".jsonl", ".json"):
        raise UserError(
            f"{path}: files ending in {path.suffix!r} are not read; use .jsonl, .json or .parquet"
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(system_error(error), kind="unreadable_file", file=path) from error
    try:
        if path.suffix == ".parquet":
            return _open_parquet(path, form)
        if path.suffix == ".json":
            return _open_array(path)
        if not path.stat().st_size:  # which the builder refuses
            return datasets.Dataset.from_dict({})
        return datasets.load_dataset(data_files=glob.escape(str(path)), split="train", **_LINES)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:]} ({reason:.200}); get the file again, or "
            "set HF_DATASETS_CACHE to a folder with room if that is the reason"
        ) from error


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
        return rows
    form.columns_of(dict.fromkeys(names), file=f"{source}: {', '.join(patterns)} of {root}")
    # Images in columns stay bytes.
    return rows.select_columns([n for n in names if n in form.names]).decode(False)


def _open_parquet(path: Path, form: RowFormat) -> datasets.Dataset:
    about = pq.read_metadata(path)
    schema = about.schema.to_arrow_schema()
    names = [name for name in schema.names if name in form.names]
    form.columns_of(dict.fromkeys(schema.names), file=str(path))
    if not about.num_rows:  # which the builder refuses
        return datasets.Dataset.from_dict({})
    kept = pa.schema([schema.field(name) for name in names])
    plain = pa.schema([field.with_type(_VIEWS.get(field.type, field.type)) for field in kept])
    return datasets.load_dataset(
        "parquet",
        data_files=glob.escape(str(path)),
        split="train",
        columns=names,
        features=None if plain == kept else datasets.Features.from_arrow_schema(plain),
    )


def _open_array(path: Path) -> datasets.Dataset:
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
