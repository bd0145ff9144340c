"""Published evaluation folders in, evaluation subsets out: what a benchmark config names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from cocoa_pl.data.instructed import READERS
from cocoa_pl.data.mmeb import EvalSubset, read_eval_subset
from cocoa_pl.data.rows import OnBadRow
from cocoa_pl.errors import UserError


class SubsetInfo(TypedDict):
    """What a benchmark's table says about a subset; `reader` is a name in `instructed.READERS`."""

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
