"""The user's folders and files in, pairs and evaluation subsets out: what a config names.

Every data source has `train_pairs`, `validation_pairs`, `validation_subsets`, `training_texts` and
`caption_subsets`; every benchmark has `name`, `subsets`, `is_partial` and `published`. Others are
in `digits` (the embedded data set), `stream`, `cocoa_json`, `composite` (a source for each stage)
and `benchmarks` (published evaluation data).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from cocoa_pl.config.bounds import Count, Seed, ShareBelowOne
from cocoa_pl.data.holdout import as_subsets, hold_out
from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.data.mmeb import read_train
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.data.pairs import read_pairs
from cocoa_pl.data.rows import OnBadRow, distinct_texts
from cocoa_pl.errors import UserError


class MmebData:
    """Training subsets in MMEB's layout; a part of them is held out for validation.

    Args:
        root: folder with one folder of parquet files for each subset.
        image_root: folder that the rows' image paths are relative to.
        split: which files of a subset to read, `<split>-*.parquet`; or several such splits.
        max_rows: rows of each subset and split that are used, from the first on; None for all.
        caps: the same for single subsets, a null for all rows of one.
        drop_orphan_slots: take `<|image_1|>` out of texts that have no image instead of refusing
            the row; MoCa-CL-Pairs and mmE5's files hold such rows.
        caption_subsets: those whose pairs are a picture and its whole caption, for the generative
            stages.
        validation_fraction: share of each subset's images (or queries) that is held out; 0 for no
            validation.
        validation_rows: held-out rows of each subset that are scored by precision@1.
        validation_seed: chooses what is held out; not the run's seed, so that all runs validate
            alike.
    """

    def __init__(
        self,
        *,
        root: str,
        image_root: str,
        subsets: Sequence[str],
        split: str | Sequence[str],
        max_rows: Count | None,
        caps: Mapping[str, Count | None] | None,
        drop_orphan_slots: bool,
        caption_subsets: Sequence[str],
        validation_fraction: ShareBelowOne,
        validation_rows: Count,
        validation_seed: Seed,
        on_bad_row: OnBadRow,
    ) -> None:
        for key, names in (("caption_subsets", caption_subsets), ("caps", caps or {})):
            if unknown := [name for name in names if name not in subsets]:
                raise UserError(f"data.{key} names {', '.join(unknown)}, not among data.subsets")
        self.root = Path(root)
        self.image_root = Path(image_root)
        self.names = tuple(subsets)
        self.split = split
        self.caps = {name: (caps or {}).get(name, max_rows) for name in subsets}
        self.drop_orphan_slots = drop_orphan_slots
        self.caption_subsets = tuple(caption_subsets)
        self.validation_fraction = validation_fraction
        self.validation_rows = validation_rows
        self.validation_seed = validation_seed
        self.on_bad_row = on_bad_row

    def train_pairs(self) -> Sequence[Pair]:
        """All rows that are not held out, subset after subset."""
        return self._parts[0]

    def validation_pairs(self) -> Sequence[Pair]:
        """The held-out rows."""
        return self._parts[1]

    def validation_subsets(self) -> list[EvalSubset]:
        """The held-out rows of each subset as a retrieval task among their own positives."""
        return as_subsets(self.validation_pairs(), max_rows=self.validation_rows)

    def training_texts(self) -> list[str]:
        """All distinct training texts without image slots, sorted: a tokenizer learns from them."""
        return distinct_texts(self.train_pairs())

    @cached_property
    def _parts(self) -> tuple[Sequence[Pair], Sequence[Pair]]:
        tables = [
            read_train(
                self.root,
                subsets=[name],
                split=self.split,
                image_root=self.image_root,
                on_bad_row=self.on_bad_row,
                max_rows=self.caps[name],
                drop_orphan_slots=self.drop_orphan_slots,
            )
            for name in self.names
        ]
        pairs = PairTable.concatenated(tables)
        return hold_out(
            pairs,
            fraction=self.validation_fraction,
            seed=self.validation_seed,
            source=str(self.root),
        )


class PairsData:
    """One file of the user's own pairs; validation from a second file, or held out of the first.

    Args:
        path: `.jsonl` or `.parquet`, columns as in `pairs`.
        image_root: folder that the rows' image paths are relative to.
        captions: whether the pairs are a picture and its caption, so that the generative stages can
            use them.
        validation_path: file of validation pairs; None to hold out a part of `path`.
        validation_fraction: share of the images (or queries) of `path` that is held out; 0 for no
            validation.
        validation_rows: validation rows that are scored by precision@1.
        validation_seed: chooses what is held out; not the run's seed, so that all runs validate
            alike.

    Raises:
        UserError: both a validation file and a fraction to hold out.
    """

    def __init__(
        self,
        *,
        path: str,
        image_root: str,
        captions: bool,
        validation_path: str | None,
        validation_fraction: ShareBelowOne,
        validation_rows: Count,
        validation_seed: Seed,
        on_bad_row: OnBadRow,
    ) -> None:
        if validation_path is not None and validation_fraction:
            raise UserError(
                "data.validation_path and data.validation_fraction are both set; "
                "set the fraction to 0 to validate on the file"
            )
        self.path = Path(path)
        self.image_root = Path(image_root)
        self.caption_subsets = (self.path.stem,) if captions else ()
        self.validation_path = None if validation_path is None else Path(validation_path)
        self.validation_fraction = validation_fraction
        self.validation_rows = validation_rows
        self.validation_seed = validation_seed
        self.on_bad_row = on_bad_row

    def train_pairs(self) -> Sequence[Pair]:
        """All rows of the file that are not held out."""
        return self._parts[0]

    def validation_pairs(self) -> Sequence[Pair]:
        """The rows of the validation file, or the held-out rows."""
        return self._parts[1]

    def validation_subsets(self) -> list[EvalSubset]:
        """The validation rows as a retrieval task among their own positives."""
        return as_subsets(self.validation_pairs(), max_rows=self.validation_rows)

    def training_texts(self) -> list[str]:
        """All distinct training texts without image slots, sorted: a tokenizer learns from them."""
        return distinct_texts(self.train_pairs())

    @cached_property
    def _parts(self) -> tuple[Sequence[Pair], Sequence[Pair]]:
        pairs = self._read(self.path)
        if self.validation_path is not None:
            return pairs, self._read(self.validation_path)
        return hold_out(
            pairs,
            fraction=self.validation_fraction,
            seed=self.validation_seed,
            source=str(self.path),
        )

    def _read(self, path: Path) -> Sequence[Pair]:
        # Both files feed the same stages, so their pairs carry the same subset's name.
        return read_pairs(
            path, subset=self.path.stem, image_root=self.image_root, on_bad_row=self.on_bad_row
        )


class HeldOut(Protocol):
    """Data that hold out rows to be scored."""

    def validation_subsets(self) -> list[EvalSubset]: ...


class HeldOutBenchmark:
    """The rows that training data hold out, scored like a benchmark.

    Args:
        name: of the benchmark, in results.
        data: whose rows.
    """

    is_partial = False
    published: tuple[()] = ()

    def __init__(self, *, name: str, data: HeldOut) -> None:
        self.name = name
        self.data = data

    def subsets(self) -> list[EvalSubset]:
        """The held-out subsets.

        Raises:
            UserError: if the data hold out nothing.
        """
        subsets = self.data.validation_subsets()
        if not subsets:
            raise UserError("the data hold out no rows to score; raise data.validation_fraction")
        return subsets
