"""Parquet files in, record batches with checked column types out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa_pl.errors import UserError


def find_parquet(root: Path, *, subset: str, split: str) -> list[Path]:
    """The files `<root>/<subset>/<split>-*.parquet` in name order; at least one."""
    folder = root / subset
    if not folder.is_dir():
        here = (
            sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        )
        has = f"it has {', '.join(here)}" if here else "it has no subset folders"
        raise UserError(f"{subset}: no folder {folder}; check the root {root} ({has})")
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        found = (
            ", ".join(sorted(path.name for path in folder.glob("*.parquet"))) or "no parquet files"
        )
        raise UserError(f"{subset}: no {split}-*.parquet in {folder} ({found}); check the split")
    return files


def read_batches(
    files: Sequence[Path],
    *,
    columns: Sequence[str] | None,
    optional: Sequence[str],
    batch_size: int,
) -> Iterator[pa.RecordBatch]:
    """The wanted columns (None: all) of all files in order; optional ones where a file has them.

    Raises:
        UserError: a file that is not parquet, or lacks a required column.
    """
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path}: cannot be read as parquet ({error}); download it again"
            ) from error
        present = file.schema_arrow.names
        missing = [name for name in columns or () if name not in present]
        if missing:
            raise UserError(f"{path}: no column {', '.join(missing)} (it has {', '.join(present)})")
        extra = [name for name in optional if name in present]
        wanted = None if columns is None else [*columns, *extra]
        with file:
            yield from file.iter_batches(batch_size=batch_size, columns=wanted)


def check_type(batch: pa.RecordBatch, column: str, *, source: str, allowed: Sequence[str]) -> None:
    """Refuse a column whose values are none of these: `"string"`, `"image"`, or a list of them."""
    kind = batch.schema.field(column).type
    inner, many = (kind.value_type, "list of {}s") if is_list(kind) else (kind, "{}")
    found = [name for name, is_it in _KINDS.items() if is_it(inner)]
    if not any(many.format(name) in allowed for name in found):
        raise UserError(
            f"{source}: column {column} holds {kind}; it must hold {' or '.join(allowed)}"
        )


def is_string(kind: pa.DataType) -> bool:
    """Whether values are text, in any of Arrow's encodings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists of any length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def is_image(kind: pa.DataType) -> bool:
    """Whether values are encoded images: bytes, or what `datasets` makes of them."""
    if pa.types.is_struct(kind):
        return {kind.field(number).name for number in range(kind.num_fields)} <= {"bytes", "path"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_KINDS = {"string": is_string, "image": is_image}
