"""MMEB folders in, training `Pair`s and `EvalSubset`s out.

Published layout: `<root>/<Subset>/<split>-*.parquet`, string columns, `""` for "absent", image
paths relative to an image root. Row numbers in messages count from 0, over the files in name order.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cocoa_pl.data.candidates import SideTable, number_rows
from cocoa_pl.data.rows import OnBadRow, check_on_bad_row, collect, log_skipped, make_item
from cocoa_pl.data.tables import check_type, find_parquet, read_batches
from cocoa_pl.errors import UserError
from cocoa_pl.items import Item, Pair

GROUPS = ("classification", "vqa", "retrieval", "grounding")

_TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
_NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


@dataclass(frozen=True)
class EvalSubset:
    """One benchmark subset; every distinct query and candidate occurs once and is encoded once.

    Attributes:
        group: one of `GROUPS`.
        query_index: int32 [Q], row -> position in `queries`.
        candidate_index: for each row int32 [C], positions in `candidates`, the positive first.
        row_ids: for each row its name in messages, e.g. `"RefCOCO row 17"`.
    """

    name: str
    group: str
    in_distribution: bool
    queries: list[Item]
    candidates: list[Item]
    query_index: np.ndarray
    candidate_index: list[np.ndarray]
    row_ids: list[str]

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise UserError(f"{self.name}: group {self.group!r} is not one of {', '.join(GROUPS)}")


def read_train(
    root: Path,
    *,
    subsets: Sequence[str],
    split: str,
    image_root: Path,
    on_bad_row: OnBadRow,
    max_rows: int | None,
) -> list[Pair]:
    """Training pairs of the named subsets in file order, of each at most its first `max_rows`.

    Columns `qry`, `qry_image_path`, `pos_text`, `pos_image_path`, and where present `neg_text`,
    `neg_image_path`, each of which holds a string, a list, or a Python list written as a string.

    Raises:
        UserError: no such folder, file or column, no usable row, or a bad row (`on_bad_row`).
    """

    def parse(row_id: str, row: dict[str, Any]) -> Pair:
        def side(text: object, image: object, role: str, *, add_missing_slot: bool = False) -> Item:
            return make_item(
                text,
                image,
                role=role,
                where=row_id,
                image_root=image_root,
                add_missing_slot=add_missing_slot,
            )

        return Pair(
            query=side(row["qry"], row["qry_image_path"], "query"),
            positive=side(row["pos_text"], row["pos_image_path"], "positive"),
            # MMEB's own negatives name images without a placeholder.
            negatives=tuple(
                side(text, image, "negative", add_missing_slot=True)
                for text, image in _negatives(row, where=row_id)
            ),
            subset=row_id.rpartition(" row ")[0],
            row_id=row_id,
        )

    if not subsets:
        raise UserError(f"{root}: no subset asked for; name at least one")
    return [
        pair
        for subset in subsets
        for pair in collect(
            _train_rows(root, subset=subset, split=split, max_rows=max_rows),
            parse,
            source=f"{subset} ({split})",
            on_bad_row=on_bad_row,
        )
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
) -> EvalSubset:
    """One evaluation subset: `qry_text`, `qry_img_path`, and lists `tgt_text`, `tgt_img_path`.

    Memory grows with the number of distinct texts and images, not with rows x candidates. A row
    with one unusable candidate is a bad row.

    Raises:
        UserError: no such folder, file or column, no usable row, or a bad row (`on_bad_row`).
    """
    check_on_bad_row(on_bad_row)
    queries, candidates = SideTable(role="query"), SideTable(role="candidate")
    row_ids, query_index, candidate_index, bad_rows = number_rows(
        root, subset=subset, split=split, queries=queries, candidates=candidates
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
    kept, rank = _keep_used(items, [candidate_index[row] for row in good])
    return EvalSubset(
        name=subset,
        group=group,
        in_distribution=in_distribution,
        queries=kept_queries,
        candidates=kept,
        query_index=query_rank[query_index[good]],
        candidate_index=[rank[candidate_index[row]] for row in good],
        row_ids=[row_ids[row] for row in good],
    )


def _train_rows(
    root: Path, *, subset: str, split: str, max_rows: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    files = find_parquet(root, subset=subset, split=split)
    for batch in read_batches(
        files, columns=_TRAIN_COLUMNS, optional=_NEGATIVE_COLUMNS, batch_size=4096
    ):
        for name in batch.schema.names:
            kinds = ("string", "list of strings") if name in _NEGATIVE_COLUMNS else ("string",)
            check_type(batch, name, source=subset, allowed=kinds)
        for row in batch.to_pylist():
            if max_rows is not None and number >= max_rows:
                return
            yield f"{subset} row {number}", row
            number += 1


def _negatives(row: dict[str, Any], *, where: str) -> list[tuple[str, str]]:
    """(text, image path) of each hard negative; entries with neither are absent, not empty."""
    texts = _as_list(row.get("neg_text", ""), column="neg_text", where=where)
    images = _as_list(row.get("neg_image_path", ""), column="neg_image_path", where=where)
    length = max(len(texts), len(images))
    # A missing column, "" and [] all mean "none of these"; anything else must match entry by entry.
    texts = texts if any(texts) else [""] * length
    images = images if any(images) else [""] * length
    if len(texts) != len(images):
        raise UserError(
            f"{where}: neg_text has {len(texts)} entries and neg_image_path {len(images)}; "
            "give one path (or an empty string) for each text"
        )
    return [(text, image) for text, image in zip(texts, images, strict=True) if text or image]


def _as_list(value: object, *, column: str, where: str) -> list[str]:
    """A negative column's value: a list, a Python list written as a string, or a single string."""
    parsed = value
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
    if not isinstance(parsed, list) or not all(isinstance(entry, str) for entry in parsed):
        raise UserError(
            f"{where}: {column} must be a string or a list of strings, found {parsed!r:.80}"
        )
    return parsed


def _keep_used(items: list[Item | None], index: list[np.ndarray]) -> tuple[list[Item], np.ndarray]:
    """The items that `index` names, and int32 [len(items)]: number -> position among them."""
    used = np.zeros(len(items), dtype=bool)
    for numbers in index:
        used[numbers] = True
    kept = [item for item, wanted in zip(items, used, strict=True) if wanted and item is not None]
    assert len(kept) == used.sum(), "a row with an unusable side was kept"
    return kept, (np.cumsum(used) - 1).astype(np.int32)
