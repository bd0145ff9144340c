"""MMEB folders in, training `Pair`s out.

Published layout: `<root>/<Subset>/<split>-*.parquet`, string columns, `""` for "absent", image
paths relative to an image root. Row numbers in messages count from 0, over the files in name order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cocoa_pl.data.items import Pair
from cocoa_pl.data.mmeb_rows import IMAGE_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS, parse_row
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.data.rows import OnBadRow, collect
from cocoa_pl.data.tables import check_type, find_parquet, read_batches
from cocoa_pl.errors import UserError


def read_train(
    root: Path,
    *,
    subsets: Sequence[str],
    split: str | Sequence[str],
    image_root: Path,
    on_bad_row: OnBadRow,
    max_rows: int | None,
    drop_orphan_slots: bool = False,
) -> PairTable:
    """Training pairs of the named subsets in file order: columns as in `mmeb_rows`.

    Args:
        split: one split, or several to be read one after the other; then row ids name the split.
        max_rows: of each subset and split, the first so many rows; None for all.
        drop_orphan_slots: as in `mmeb_rows.parse_row`.

    Rows that repeat another row's query and positive are left out and counted in the log.

    Raises:
        UserError: no such folder, file or column, no usable row, or a bad row (`on_bad_row`).
    """
    if not subsets:
        raise UserError(f"{root}: no subset asked for; name at least one")
    splits = [split] if isinstance(split, str) else list(split)
    if not splits:
        raise UserError(f"{root}: no split asked for; name at least one")

    def read_subset(subset: str) -> PairTable:
        def parse(row_id: str, row: dict[str, Any]) -> Pair:
            return parse_row(
                row,
                row_id=row_id,
                subset=subset,
                image_root=image_root,
                drop_orphan_slots=drop_orphan_slots,
            )

        rows = (
            named_row
            for one in splits
            for named_row in _train_rows(
                root,
                subset=subset,
                split=one,
                max_rows=max_rows,
                label=subset if len(splits) == 1 else f"{subset} ({one})",
            )
        )
        return collect(
            rows,
            parse,
            source=f"{subset} ({', '.join(splits)})",
            on_bad_row=on_bad_row,
            duplicates="drop",
        )

    return PairTable.concatenated([read_subset(subset) for subset in subsets])


def _train_rows(
    root: Path, *, subset: str, split: str, max_rows: int | None, label: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    files = find_parquet(root, subset=subset, split=split)
    for batch in read_batches(
        files, columns=TRAIN_COLUMNS, optional=NEGATIVE_COLUMNS, batch_size=512
    ):
        for name in batch.schema.names:
            kinds = ["string", "image"] if name in IMAGE_COLUMNS else ["string"]
            kinds += [f"list of {kind}s" for kind in kinds if name in NEGATIVE_COLUMNS]
            check_type(batch, name, source=subset, allowed=kinds)
        for row in batch.to_pylist():
            if max_rows is not None and number >= max_rows:
                return
            yield f"{label} row {number}", row
            number += 1
