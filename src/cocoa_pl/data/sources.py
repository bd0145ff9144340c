"""What a data config names: files of pairs, of which a part is held out, or a source a stage.

Every data source has `train_pairs`, `validation_pairs`, `validation_subsets`, `training_texts`,
`caption_subsets` and `left_out`; `digits` is another one.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from cocoa_pl.config.bounds import Count, Seed, ShareBelowOne, Whole
from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Pair, numbered
from cocoa_pl.data.pairs import FileRows, Pairs, read, read_files
from cocoa_pl.data.readers import HUB_ID, find_files, open_stream
from cocoa_pl.data.rows import Columns, OnBadRow, Repeated, RowErrors, RowFormat
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError, absent, first_line, typed


@dataclass(kw_only=True, eq=False)
class PairSource:
    """Pairs of files, subset by subset; a part of them is held out for validation.

    Its arguments are the keys of conf/data/common/source.yaml, which says what each means; see
    `RowFormat` and `PairStream` too.

    Raises:
        UserError: for caps or caption subsets of no subset, or a validation file and a fraction.
    """

    path: str | None
    root: str | None
    files: str | None
    split: str | Sequence[str] | None
    subsets: Sequence[str] | None
    columns: Sequence[Columns]
    image_root: str
    images_placed: bool
    other_columns: bool
    drop_orphan_slots: bool
    repeated: Repeated
    max_rows: Count | None
    caps: Mapping[str, Count | None] | None
    caption_subsets: Sequence[str] | None
    validation_path: str | None
    validation_fraction: ShareBelowOne
    validation_rows: Whole
    validation_seed: Seed
    streaming: bool
    window: Count
    rows: Mapping[str, Count] | None
    on_bad_row: OnBadRow

    def __post_init__(self) -> None:
        names = self.subsets or ()
        for key in ("caption_subsets", "caps", "rows"):
            if unknown := [name for name in getattr(self, key) or () if name not in names]:
                raise UserError(f"data.{key} names {', '.join(unknown)}, not among data.subsets")
        if self.rows and len(self.rows) < len(names):
            raise UserError("data.rows must name every subset, or be null")
        if self.validation_path is not None and self.validation_fraction:
            raise UserError(
                "data.validation_path and data.validation_fraction are both set; "
                "set the fraction to 0 to validate on the file"
            )
        self.left_out = RowErrors()  # of each row that is not used, when it was read
        self.place = str(self.root if self.path is None else self.path)
        values = {field.name: getattr(self, field.name) for field in fields(RowFormat)}
        self.form = RowFormat(**values | {"image_root": Path(self.image_root)})

    def train_pairs(self) -> Pairs | PairStream:
        """All rows that are not held out, subset after subset."""
        return self._parts[0]

    def validation_pairs(self) -> Pairs:
        """The held-out rows, or those of the validation file."""
        return self._parts[1]

    def validation_subsets(self) -> list[EvalSubset]:
        """The held-out rows of each subset as a retrieval task among their own positives."""
        return as_subsets(self.validation_pairs(), max_rows=self.validation_rows)

    def training_texts(self) -> list[str]:
        """All distinct training texts without slots, sorted: a tokenizer learns from them.

        Of a stream, the held-out rows' texts, which are all that is at hand.
        """
        pairs, held_out = self._parts
        return distinct_texts(held_out if isinstance(pairs, PairStream) else pairs)

    @cached_property
    def _parts(self) -> tuple[Pairs | PairStream, Pairs]:
        if self.streaming:
            return self._streamed()
        pairs = Pairs.joined([self._read(name, files) for name, files in self._subsets()])
        if self.validation_path is not None:
            # Both files feed the same stages, so their pairs carry the same subset's name.
            return pairs, self._read(pairs.names[0], _one_file(self.validation_path))
        is_held_out = self._held_out(pairs)
        return pairs.select(~is_held_out), pairs.select(is_held_out)

    def _held_out(self, pairs: Pairs) -> np.ndarray:
        """bool [N]; rows with the same image, or else query, stay together.

        Of each subset the same share of such groups is held out, at least one. The choice depends
        on the seed and the rows themselves, not on their order.

        Raises:
            UserError: a subset with a single group.
        """
        is_held_out = np.zeros(len(pairs), dtype=bool)
        names, codes = pairs.subset_codes()
        for code, subset in enumerate(names if self.validation_fraction else ()):
            rows = np.flatnonzero(codes == code)
            groups = pairs.known["group"][rows]
            ranked = sorted(np.unique(groups).tolist(), key=self._rank)
            if len(ranked) < 2:
                raise UserError(
                    f"{self.place}: {subset} has one distinct image or query, so none can be held "
                    "out; set validation_fraction to 0"
                )
            count = min(math.ceil(self.validation_fraction * len(ranked)), len(ranked) - 1)
            is_held_out[rows] = np.isin(groups, ranked[:count])
        return is_held_out

    def _rank(self, group: int) -> bytes:
        return hashlib.blake2b(f"{self.validation_seed} {group}".encode(), digest_size=8).digest()

    def _streamed(self) -> tuple[PairStream, Pairs]:
        subsets, validation = {}, []
        for name, files in self._patterns().items():
            subsets[name] = open_stream(self.place, list(files.values()), self.form, source=name)
            first = datasets.Dataset.from_list(list(subsets[name].take(self.validation_rows)))
            if len(first):
                rows = FileRows(first, self.form, name, f"{name} row")
                validation.append(read([rows], source=name, left_out=self.left_out))
        held_out = Pairs.joined(validation)
        stream = PairStream(
            subsets,
            dict.fromkeys(subsets, 1) | dict(self.rows or {}),
            self.form,
            self.window,
            frozenset(held_out.known["group"].tolist()),
        )
        return stream, held_out

    def _subsets(self) -> Iterator[tuple[str, Mapping[str, Sequence[Path]]]]:
        """Each subset's name, and what its rows are called in messages -> the files of these."""
        if self.files is None:
            yield Path(self.place).stem, _one_file(self.place)
        elif self.subsets is None:
            for file in find_files(Path(self.place), self.files, source=self.place):
                yield file.stem, {file.name: [file]}
        else:
            subsets = self._patterns()
            folder = local_folder(self.place, [p for one in subsets.values() for p in one.values()])
            for name, patterns in subsets.items():
                found = {k: find_files(folder, one, source=name) for k, one in patterns.items()}
                yield name, found

    def _patterns(self) -> dict[str, dict[str, str]]:
        """Subset -> what its rows are called in messages -> a pattern for the files of these."""
        splits = [self.split] if isinstance(self.split, str) else list(self.split or ())
        for key, given in (("subsets", self.subsets), ("split", splits)):
            if not given:
                raise UserError(f"data.{key} is empty; name at least one")
        files = str(self.files)
        return {
            name: {
                f"{name} ({split})" if splits[1:] else name: files.format(subset=name, split=split)
                for split in splits
            }
            for name in self.subsets or ()
        }

    def _read(self, subset: str, files: Mapping[str, Sequence[Path]]) -> Pairs:
        return read_files(
            files,
            self.form,
            subset=subset,
            max_rows=(self.caps or {}).get(subset, self.max_rows),
            left_out=self.left_out,
        )


def _one_file(path: str) -> Mapping[str, Sequence[Path]]:
    if os.path.isdir(path):
        words = f"data.path=null {typed('data.root', path)} 'data.files=\"*.jsonl\"'"
        raise UserError(f"{path} is a folder; set data.path to a file, or read all of it: {words}")
    if not os.path.isfile(path):
        raise absent(path, "set data.path to a .jsonl, .json or .parquet file")
    return {path: [Path(path)]}


def local_folder(root: str, patterns: Sequence[str]) -> Path:
    """A folder, or that of the hub's cache into which these files of a data set are fetched.

    Images are not fetched: the hub keeps them as archives, which have to be unpacked somewhere.

    Raises:
        UserError: if the hub cannot be reached and the cache has no copy.
    """
    if Path(root).is_dir() or not HUB_ID.fullmatch(root):
        return Path(root)
    repo, _, revision = root.partition("@")
    try:
        found = snapshot_download(
            repo, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{root} is no folder and cannot be fetched from the hub ({first_line(error):.200}); "
            f"where there is a network, run: hf download {repo} --repo-type dataset --local-dir "
            "FOLDER, unpack its image archives there, and use data=mmeb data.root=FOLDER"
        ) from error
    return Path(found)


def as_subsets(pairs: Iterable[Pair], *, max_rows: int) -> list[EvalSubset]:
    """One retrieval task for each subset: its first `max_rows` rows, among their positives.

    A row's candidates leave out the other positives of its own query, which are right answers too.
    """
    by_subset: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_subset[pair.subset].append(pair)
    subsets = []
    for name, rows in by_subset.items() if max_rows else ():
        rows = rows[:max_rows]
        queries, query_index = numbered([row.query for row in rows])
        candidates, positive_index = numbered([row.positive for row in rows])
        answers: dict[int, list[int]] = defaultdict(list)
        for query, positive in zip(query_index, positive_index, strict=True):
            answers[query].append(positive)
        everything = np.arange(len(candidates), dtype=np.int32)
        candidate_index = [
            np.concatenate([everything[[positive]], np.delete(everything, answers[query])])
            for query, positive in zip(query_index, positive_index, strict=True)
        ]
        subsets.append(
            EvalSubset(
                name=name,
                group="retrieval",
                in_distribution=True,
                queries=queries,
                candidates=candidates,
                query_index=np.asarray(query_index, dtype=np.int32),
                candidate_index=candidate_index,
                row_ids=[row.row_id for row in rows],
            )
        )
    return subsets


def distinct_texts(pairs: Iterable[Pair]) -> list[str]:
    """All distinct texts of the pairs without slots, sorted."""
    items = (item for pair in pairs for item in (pair.query, pair.positive, *pair.negatives))
    return sorted({item.text.replace(IMAGE_SLOT, "") for item in items})


class DataOfStages:
    """A source of its own for each stage: generative stages on captions, contrast on pairs.

    Args:
        stages: stage name -> what any other data config builds.
        scored: the stage whose held-out rows `benchmark=held_out` scores.
    """

    def __init__(self, *, stages: Mapping[str, Any], scored: str) -> None:
        if scored not in stages:
            raise UserError(f"data.scored names {scored}; data.stages holds {', '.join(stages)}")
        self.stages = dict(stages)
        self.scored = scored

    def validation_subsets(self) -> list[EvalSubset]:
        """The held-out rows of the scored stage's source."""
        return list(self.stages[self.scored].validation_subsets())

    def training_texts(self) -> Sequence[str]:
        """All distinct training texts of all stages, sorted."""
        return sorted({t for source in self.stages.values() for t in source.training_texts()})


def source_of(data: Any, stage: str) -> Any:
    """What a stage trains on: the data themselves, or the stage's own among data of stages.

    Raises:
        UserError: if it has none.
    """
    if not isinstance(data, DataOfStages):
        return data
    if stage not in data.stages:
        raise UserError(
            f"stage {stage} has no data; data.stages holds {', '.join(data.stages)}: "
            f"add data.stages.{stage}, or leave the stage out with stage.order"
        )
    return data.stages[stage]


@dataclass(frozen=True, kw_only=True)
class HeldOutBenchmark:
    """The rows that training data hold out, scored like a benchmark.

    Args:
        name: of the benchmark, in results.
        data: whose rows, any data config builds.
    """

    name: str
    data: Any
    is_partial: ClassVar = False
    published: ClassVar[tuple[()]] = ()

    def subsets(self) -> list[EvalSubset]:
        """The held-out subsets.

        Raises:
            UserError: if the data hold out nothing.
        """
        if subsets := list(self.data.validation_subsets()):
            return subsets
        raise UserError("the data hold out no rows to score; raise data.validation_fraction")
