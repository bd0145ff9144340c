"""MMEB folders in, training `Pair`s and `EvalSubset`s out.

Published layout: `<root>/<Subset>/<split>-*.parquet`, string columns, `""` for "absent", image
paths relative to an image root. Row numbers in messages count from 0, over the files in name order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_pl.data.candidates import SideTable, number_rows
from cocoa_pl.data.instructed import Reader
from cocoa_pl.data.mmeb_rows import IMAGE_COLUMNS, NEGATIVE_COLUMNS, TRAIN_COLUMNS, parse_row
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.data.rows import OnBadRow, check_on_bad_row, collect, log_skipped
from cocoa_pl.data.tables import check_type, find_parquet, read_batches
from cocoa_pl.errors import UserError
from cocoa_pl.items import Item, Pair

GROUPS = ("classification", "vqa", "retrieval", "grounding")


@dataclass(frozen=True)
class EvalSubset:
    """One benchmark subset; every distinct query and candidate occurs once and is encoded once.

    Attributes:
        group: one of `GROUPS`.
        query_index: int32 [Q], row -> position in `queries`.
        candidate_index: for each row int32 [C], positions in `candidates`, the positive first;
            `CandidateRows` where rows share lists.
        row_ids: for each row its name in messages, e.g. `"RefCOCO row 17"`.
    """

    name: str
    group: str
    in_distribution: bool
    queries: list[Item]
    candidates: list[Item]
    query_index: np.ndarray
    candidate_index: Sequence[np.ndarray]
    row_ids: list[str]

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise UserError(f"{self.name}: group {self.group!r} is not one of {', '.join(GROUPS)}")


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
