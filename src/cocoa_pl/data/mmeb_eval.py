"""The evaluation folders of MMEB, version 1 and 2, as `EvalSubset`s.

Layout: `<root>/<Subset>/<split>-*.parquet`, image paths relative to an image root, `""` for none.
The first candidate of a row is its positive.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cocoa_pl.config.bounds import Names
from cocoa_pl.data.images import embedded
from cocoa_pl.data.items import GROUPS, PLACEHOLDER, EvalSubset, Item
from cocoa_pl.data.readers import find_files
from cocoa_pl.data.rows import OnBadRow, RowErrors, make_item
from cocoa_pl.errors import UserError, first_line


class SubsetInfo(TypedDict):
    """What a benchmark's table says about a subset; `reader` is a name in `READERS`."""

    group: str
    in_distribution: bool
    reader: NotRequired[str]


class Sides(NamedTuple):
    """A row's query or its candidates; those of one name are one item, made of the first of them.

    Lists instead of one object each: 36 subsets hold 36 million candidates.
    """

    names: Sequence[Hashable]
    texts: Sequence[Any]
    images: Sequence[Any]

    @classmethod
    def plain(cls, texts: Sequence[Any], images: Sequence[Any]) -> "Sides":
        """Known by all that they hold."""
        return cls(list(zip(texts, images, strict=True)), texts, images)


# Distinct items by name, numbered in the order in which good rows name them.
_Items = dict[Hashable, tuple[int, Item]]


@dataclass(frozen=True)
class Reader:
    """How the rows of a meta-task of V2 become V1's strings.

    V2's annotations (`ziyjiang/MMEB_Test_Instruct`) hold instruction, text and image apart. Strings
    and names follow the benchmark's own harness, which goes to some length to give V1's strings
    again (https://github.com/TIGER-AI-Lab/VLM2Vec, src/data/eval_dataset/image_*.py).

    Args:
        query: whether queries hold an image.
        target: what the candidates are; images may have captions.
        own_line: the query's instruction is stripped and put on a line of its own.
        end: behind the query.
    """

    query: Literal["image", "text"]
    target: Literal["image", "text"]
    own_line: bool
    end: str

    @property
    def columns(self) -> list[str]:
        """The columns it needs; others may be missing or hold anything."""
        query = ["qry_inst", "qry_text"] + ["qry_img_path"] * (self.query == "image")
        return query + ["tgt_text"] + ["tgt_inst", "tgt_img_path"] * (self.target == "image")

    def sides(self, row: Mapping[str, Any]) -> tuple[Sides, Sides]:
        """The query and the candidates."""
        instruction, text = row["qry_inst"], row["qry_text"]
        if self.query == "image":
            instruction = instruction.replace(PLACEHOLDER, "")
            instruction = f"\n{instruction.strip()}" if self.own_line else instruction
            text = _tight(f"{PLACEHOLDER} {instruction}" + (f" {text}" if text else ""))
        else:
            text = f"{instruction} {text}"
        query = Sides.plain([text + self.end], [row.get("qry_img_path", "")])
        captions = row["tgt_text"]
        if self.target == "text":
            return query, Sides(captions, captions, [""] * len(captions))
        images = row["tgt_img_path"]
        prompt = f"{PLACEHOLDER} " + row["tgt_inst"].replace(PLACEHOLDER, "")
        if captions[0].strip():  # the first one decides for the row
            texts = [_tight(f"{prompt} {caption}") + "\n" for caption in captions]
        else:
            texts = [_tight(prompt) + ("" if self.query == "image" else "\n")] * len(images)
        if self.query == "image":  # RefCOCO-Matching: objects of one image have captions
            names = [
                (one, caption.strip('"')) for one, caption in zip(images, captions, strict=True)
            ]
            return query, Sides(names, texts, images)
        return query, Sides(images, texts, images)  # WebQA and EDIS: captions of an image collapse


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "classification": Reader("image", "text", own_line=False, end="\n"),
        "vqa": Reader("image", "text", own_line=True, end="\n"),
        "i2t": Reader("image", "text", own_line=False, end="\n"),
        "t2i": Reader("text", "image", own_line=False, end="\n"),
        "dialogue_t2i": Reader("text", "image", own_line=False, end="\n\n"),
        "i2i": Reader("image", "image", own_line=True, end="\n"),
    }
)

# What a table may say.
ABOUT: Mapping[str, Sequence[object]] = MappingProxyType(
    {"group": GROUPS, "in_distribution": (True, False), "reader": tuple(READERS)}
)


class MmebBenchmark:
    """Evaluation subsets in MMEB's layout: V1's columns, or V2's where the table names readers.

    Args:
        name: of the benchmark, in results.
        root: folder with one folder of parquet files for each subset.
        image_root: folder that the rows' image paths are relative to; None for
            `<root>/eval_images`, or the root if that is not there.
        split: which files of a subset to read, `<split>-*.parquet`.
        table: subset -> its group, and whether its training data is in the training set.
        unlisted: the benchmark is what is in the root, and this is said of subsets that the table
            does not name; None: it is the table, and all of it must be there.
        subsets: the ones to score, all if None; means over a choice are not reported.
        published: rows of papers to stand beside (`evaluation.report`); empty for none.

    Raises:
        UserError: for an unknown subset, group or reader, or a root without any subset.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str,
        image_root: str | None,
        split: str,
        table: Mapping[str, SubsetInfo],
        unlisted: SubsetInfo | None,
        subsets: Names | None,
        published: Sequence[Mapping[str, object]],
        on_bad_row: OnBadRow,
    ) -> None:
        if unlisted is not None:
            there = {file.parent.name for file in Path(root).glob(f"*/{split}-*.parquet")}
            if not there:
                raise UserError(f"benchmark.root={root} has no file <Subset>/{split}-*.parquet")
            table = {s: {**unlisted, **table[s]} if s in table else unlisted for s in sorted(there)}
        if unknown := [subset for subset in subsets or () if subset not in table]:
            raise UserError(
                f"benchmark.subsets names {unknown[0]}, but {name} has {', '.join(table)}"
            )
        for subset, info in table.items():
            for key in ("group", "in_distribution", *info):
                if info.get(key) not in ABOUT.get(key, ()):
                    choices = ", ".join(map(str, ABOUT.get(key, ABOUT)))
                    raise UserError(
                        f"benchmark.table.{subset}.{key} is {info.get(key)}; choose {choices}"
                    )
        self.name = name
        self.root = Path(root)
        if image_root is None:
            images = self.root / "eval_images"
            image_root = str(images if images.is_dir() else root)
        self.image_root = Path(image_root)
        self.split = split
        self.table = {s: info for s, info in table.items() if subsets is None or s in subsets}
        self.is_partial = len(self.table) < len(table)
        self.published = published
        self.on_bad_row = on_bad_row
        self.left_out = RowErrors()  # of each row that is not used, when it was read

    def subsets(self) -> list[EvalSubset]:
        """The subsets in the table's order; one that is missing is an error.

        A row with one unusable candidate is a bad row.

        Raises:
            UserError: no such folder, file or column, no usable row, or a bad row (`on_bad_row`).
        """
        self.left_out = RowErrors()
        return [self._read(subset, info) for subset, info in self.table.items()]

    def _read(self, subset: str, info: SubsetInfo) -> EvalSubset:
        """`qry_text`, `qry_img_path`, and lists `tgt_text`, `tgt_img_path`; V2's with a reader."""
        reader = READERS[info["reader"]] if "reader" in info else None
        known: dict[str, _Items] = {"query": {}, "candidate": {}}
        index: dict[str, list[np.ndarray]] = {"query": [], "candidate": []}
        row_ids: list[str] = []
        errors = RowErrors()
        columns = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
        files = find_files(self.root, f"{subset}/{self.split}-*.parquet", source=subset)
        for row_id, row in _rows(files, subset, reader.columns if reader else columns):
            try:
                sides = _sides(_checked(row), reader)
                new = {role: self._new_items(sides[role], known[role], role) for role in known}
            except UserError as error:
                error.row_id, error.kind = row_id, error.kind or "bad_row"
                if self.on_bad_row == "fail":
                    raise
                errors.add(copy(error))  # without its frames, which hold the row
                continue
            row_ids.append(row_id)
            for role, items in known.items():
                items |= new[role]
                index[role].append(np.array([items[n][0] for n in sides[role].names], np.int32))
        errors.log(source=subset)
        self.left_out.join(errors)
        if not row_ids:
            where = self.root / subset
            count = errors.counts.total()
            raise UserError(f"{subset}: no usable row in {where} ({count} skipped)")
        return EvalSubset(
            name=subset,
            group=info["group"],
            in_distribution=info["in_distribution"],
            queries=[item for _, item in known["query"].values()],
            candidates=[item for _, item in known["candidate"].values()],
            query_index=np.concatenate(index["query"]),
            candidate_index=index["candidate"],
            row_ids=row_ids,
        )

    def _new_items(self, sides: Sides, known: _Items, role: str) -> _Items:
        """What a row adds. 1000 rows x 1000 candidates name a few thousand distinct items: only
        those become `Item`s.
        """
        new: _Items = {}
        for name, text, image in zip(*sides, strict=True):
            if name not in known and name not in new:
                item = make_item(
                    text, image, role=role, image_root=self.image_root, add_missing_slot=False
                )
                new[name] = len(known) + len(new), item
        return new


def _rows(
    files: Sequence[Path], subset: str, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for path in files:
        try:  # a page may be damaged behind a footer that is whole
            with pq.ParquetFile(path) as file:
                if missing := [name for name in columns if name not in file.schema_arrow.names]:
                    has = ", ".join(file.schema_arrow.names)
                    raise UserError(f"{path}: no column {', '.join(missing)} (it has {has})")
                # 16 rows x 1000 candidates are a few megabytes of strings.
                for batch in file.iter_batches(batch_size=16, columns=columns):
                    for row in batch.to_pylist():
                        yield f"{subset} row {number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: cannot be read as parquet ({first_line(error):.200}); download it again",
                file=path,
            ) from error


def _sides(row: Mapping[str, Any], reader: Reader | None) -> dict[str, Sides]:
    if reader is not None:
        query, targets = reader.sides(row)
    else:
        query = Sides.plain([row["qry_text"]], [row["qry_img_path"]])
        targets = Sides.plain(row["tgt_text"], row["tgt_img_path"])
    return {"query": query, "candidate": targets}


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with every image as a path or bytes; refuses values of other types, nulls where an
    empty string belongs, no candidates, and lists of unequal length.
    """
    checked = {}
    for name, value in row.items():
        is_list, is_image = name in ("tgt_text", "tgt_img_path"), name.endswith("img_path")
        values = value if is_list else [value]
        if not isinstance(values, list):
            raise UserError(f"{name} must be a list, an entry for each candidate")
        if is_image:
            values = [one if isinstance(one, str) else embedded(one) or "" for one in values]
        if wrong := set(map(type, values)) - ({str, bytes} if is_image else {str}):
            kind = "a null" if None in values else wrong.pop().__name__
            raise UserError(f"{name} holds {kind}; write a string, empty for none")
        checked[name] = values if is_list else values[0]
    texts, images = checked["tgt_text"], checked.get("tgt_img_path", checked["tgt_text"])
    if len(texts) != len(images):
        raise UserError(
            f"tgt_text has {len(texts)} entries and tgt_img_path {len(images)}; each candidate "
            "needs both (an empty string for none)"
        )
    if not texts:
        raise UserError("no candidates; fill tgt_text or drop the row")
    return checked


def _tight(text: str) -> str:
    """No blank in front of a line break, as in V1."""
    return text.replace(" \n", "\n")
