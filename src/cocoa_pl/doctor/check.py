"""Check everything that a training run would read, in the order of the data.

What is wrong with rows, images and samples their readers say. Rows are compared by what they hold:
an image counts by the content of its file, so that a copy under another name is the same image.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cocoa_pl.data.datamodule import check_mixing
from cocoa_pl.data.examples import check_contrast
from cocoa_pl.data.items import EvalSubset, Item, Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.rows import RowErrors
from cocoa_pl.data.sampler import mix
from cocoa_pl.data.sources import PairSource, source_of
from cocoa_pl.doctor.measure import Images, Watch, count_tokens, file_name, in_workers, length_facts
from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Stage

# What other projects write where an image belongs: here it is words, unless the row has the image.
_IMAGE_TAG = re.compile(r"<\|?(?:image|img)(?:[ _-]?\d+)?\|?>", re.IGNORECASE)

_OVERLAPS = {
    "overlap_pair": "query and positive are",
    "overlap_query": "the query is",
    "overlap_image": "an image is",
}


class Source(NamedTuple):
    """Rows of one data source without the bad ones.

    Attributes:
        suffix: of the names of its parts, where stages have sources of their own.
        stages: that read it, with their places among all.
    """

    suffix: str
    stages: Sequence[tuple[int, Stage]]
    caption_subsets: Sequence[str] | None
    train: Pairs
    validation: Pairs


@dataclass
class Checkup:
    """What is checked, and what was found.

    Args:
        stages: of the run, in order.
        seed: of the run.
        workers: processes; 0 works in this one.
        watch: passes values on and shows how many there were.
    """

    stages: Sequence[Stage]
    seed: int
    workers: int
    watch: Watch

    def __post_init__(self) -> None:
        self.found = defaultdict[str, RowErrors](RowErrors)  # part of the data -> what is wrong
        self.sources: list[Source] = []
        self.benchmark, self.subsets = "", list[EvalSubset]()  # the benchmark
        self.lengths: list[dict[str, Any]] = []  # see `length_facts`
        self.visual_tokens = np.empty(0, np.int64)  # of each image that can be read

    def read_training(self, data: Any, pieces: Sequence[Any]) -> None:
        """Read training and validation rows.

        Args:
            pieces: each subset of the data alone, so that one missing folder does not hide the
                rest; none to read the data as a whole.

        Raises:
            UserError: for data that are streamed.
        """
        readers: dict[int, list[tuple[int, Stage]]] = {}  # of each source
        for index, stage in enumerate(self.stages):
            readers.setdefault(id(source_of(data, stage.name)), []).append((index, stage))
        for stages in readers.values():
            source = source_of(data, stages[0][1].name)
            if isinstance(source, PairSource) and source.streaming:
                raise UserError(
                    "streamed rows cannot be compared with each other; fetch a part of the corpus "
                    "and check that with data=mmeb data.root=FOLDER"
                )
            names = ", ".join(stage.name for _, stage in stages)
            suffix = f" ({names})" if len(readers) > 1 else ""
            parts = self._read(f"train{suffix}", pieces or [source], _pairs_of)
            train, validation = (Pairs.joined([part[at] for part in parts]) for at in (0, 1))
            self.sources.append(Source(suffix, stages, source.caption_subsets, train, validation))

    def read_benchmark(self, name: str, pieces: Sequence[Any]) -> None:
        """Read the rows of a benchmark, as a whole or each subset alone."""
        self.benchmark = name
        self.subsets = [*chain(*self._read(name, pieces, lambda piece: piece.subsets()))]

    def _read(self, part: str, pieces: Sequence[Any], get: Callable[[Any], Any]) -> list[Any]:
        """What can be had of the pieces."""
        values = []
        for piece in self.watch(pieces, f"files of {part}", len(pieces)):
            try:
                values.append(get(piece))
            except UserError as error:
                self._tell(part, str(error), kind="unreadable_source", file=error.file)
            self.found[part].join(piece.left_out)
        return values

    def _tell(self, part: str, message: str, **about: Any) -> None:
        self.found[part].add(UserError(message, **about))

    def check(self, processors: Sequence[Processor]) -> None:
        """Check what was read.

        Args:
            processors: for training and for evaluation; none if the model is not at hand.
        """
        processor, eval_processor = processors or (None, None)
        items = (item for _, _, sides in self._rows() for _, item in sides)
        self.images = Images(items, workers=self.workers, watch=self.watch)
        if processor:
            counts = [processor.count_visual_tokens(*size) for size in self.images.sizes.tolist()]
            self.visual_tokens = np.array(counts, np.int64)
        count = sum(len(pairs) for _, pairs in self._parts())
        count += sum(len(subset.queries) + len(subset.candidates) for subset in self.subsets)
        for part, row_id, sides in self.watch(self._rows(), "rows", count):
            for role, item in sides:
                used = eval_processor if part == self.benchmark else processor
                for error in self._faults(item, used):
                    error.row_id, error.role = row_id, role
                    self.found[part].add(error)
        for source in self.sources:
            for index, stage in source.stages if source.train else ():  # else its error is there
                self._check_stage(stage, source, processor, seed=mix(self.seed, index))
        self._compare()

    def _parts(self) -> Iterator[tuple[str, Pairs]]:
        for source in self.sources:
            yield f"train{source.suffix}", source.train
            yield f"validation{source.suffix}", source.validation

    @property
    def num_rows(self) -> dict[str, int]:
        """How many rows of each part can be used."""
        counts = {part: len(pairs) for part, pairs in self._parts()}
        if self.benchmark:
            counts[self.benchmark] = sum(len(subset.row_ids) for subset in self.subsets)
        return counts

    def _rows(self) -> Iterator[tuple[str, str, list[tuple[str, Item]]]]:
        """Part, name and sides of every row; each item of a benchmark once, in its first row."""
        for part, pairs in self._parts():
            for pair in pairs:
                yield part, pair.row_id, sides_of(pair)
        for subset in self.subsets:
            query_rows = np.zeros(len(subset.queries), dtype=np.int64)
            candidate_rows = np.zeros(len(subset.candidates), dtype=np.int64)
            for row in reversed(range(len(subset.row_ids))):
                query_rows[subset.query_index[row]] = row
                candidate_rows[subset.candidate_index[row]] = row
            for row, item in zip(query_rows.tolist(), subset.queries, strict=True):
                yield self.benchmark, subset.row_ids[row], [("query", item)]
            for row, item in zip(candidate_rows.tolist(), subset.candidates, strict=True):
                yield self.benchmark, subset.row_ids[row], [("candidate", item)]

    def _faults(self, item: Item, processor: Processor | None) -> Iterator[UserError]:
        """What is wrong with one side of a row."""
        if tag := _IMAGE_TAG.search(item.text):
            yield UserError(f"the text holds {tag[0]}, which is read as words", kind="image_tag")
        opened = [self.images[image] for image in item.media]
        unreadable = [image.error for image in opened if image.error]
        yield from map(copy, unreadable)  # other rows may have the image, too
        if processor and opened and not unreadable:
            visual_tokens = [processor.count_visual_tokens(*image.size) for image in opened]
            try:
                processor.room_for_text(visual_tokens)
            except UserError as error:
                error.file = file_name(item.media[0])
                yield error

    def _check_stage(
        self, stage: Stage, source: Source, processor: Processor | None, *, seed: int
    ) -> None:
        """Whether the stage has enough rows, and the lengths of the samples that it makes of them.

        Args:
            seed: of the stage, as in training.
        """
        part, usable, rows = f"train{source.suffix}", source.train, None
        try:
            if stage.describing:
                usable = usable.describing(source.caption_subsets)
                if source.validation:
                    source.validation.describing(source.caption_subsets)
            rows = usable.first_of_each_subset(stage.max_rows_per_subset)
            check_mixing(rows, stage.mixing, batch_size=stage.batch_size)
            check_contrast(rows, stage.make_samples, batch_size=stage.batch_size)
        except UserError as error:
            self._tell(part, f"stage {stage.name}: {error}", kind="too_few_rows")
        if not rows or not processor:
            return
        count = partial(count_tokens, rows, stage.make_samples, processor, self.images, seed)
        counted = in_workers(count, range(len(rows)), workers=self.workers)
        totals, num_unknown, limit = [], 0, processor.max_length
        for row_id, samples in self.watch(counted, f"lengths in {stage.name}", len(rows)):
            known = [total for total in samples if total is not None]
            totals += known
            num_unknown += len(samples) - len(known)
            for total in known:
                if total > limit:
                    cut = f"max_length={limit} cuts {total - limit} of its text"
                    message = f"{total} tokens in {stage.name}; {cut}"
                    self._tell(part, message, kind="truncated_text", row_id=row_id)
        self.lengths.append(length_facts(stage, len(rows), totals, num_unknown, limit))

    def _compare(self) -> None:
        """Hard negatives that are positives, training rows in an evaluation, several positives."""
        evaluated: dict[tuple[str, int], str] = {}  # kind and content -> the first row with it
        held_out: list[tuple[str, Iterable[Pair]]] = [
            *((f"validation{one.suffix}", one.validation) for one in self.sources),
            *((self.benchmark, right_answers(subset)) for subset in self.subsets),
        ]
        for part, answers in held_out:
            for pair in answers:
                for kind, content, _ in self._contents(pair):
                    evaluated.setdefault((kind, content), f"{part}, {pair.row_id}")
        for source in self.sources:
            part, pairs = f"train{source.suffix}", source.train
            keys = np.empty((len(pairs), 2), np.int64)  # of query and positive, by content
            for row, pair in enumerate(self.watch(pairs, f"overlap{source.suffix}", len(pairs))):
                keys[row] = [self.images.content_of(item) for item in (pair.query, pair.positive)]
                for place, negative in enumerate(pair.negatives):
                    if self.images.content_of(negative) == keys[row, 1]:
                        file = file_name(negative.media[0]) if negative.media else ""
                        about = {"row_id": pair.row_id, "role": "negative", "file": file}
                        message = f"number {place} is the positive itself"
                        self._tell(part, message, kind="negative_is_positive", **about)
                for kind, content, file in self._contents(pair):
                    if where := evaluated.get((kind, content)):
                        message = f"{_OVERLAPS[kind]} in {where}"
                        self._tell(part, message, kind=kind, row_id=pair.row_id, file=file)
                        break
            counts = pd.DataFrame(keys).groupby(0)[1].transform("nunique").to_numpy()
            for row in np.flatnonzero(counts > 1).tolist():
                about = {"row_id": pairs[row].row_id, "role": "query"}
                message = f"it has {counts[row]} different positives"
                self._tell(part, message, kind="several_positives", **about)

    def _contents(self, pair: Pair) -> Iterator[tuple[str, int, str]]:
        """Kind, content and file of what may be in an evaluation, too, the strongest first."""
        keys = self.images.content_of(pair.query), self.images.content_of(pair.positive)
        yield "overlap_pair", hash(keys), ""
        yield "overlap_query", keys[0], ""
        for image in (*pair.query.media, *pair.positive.media):
            if not self.images[image].error:
                yield "overlap_image", self.images[image].content, file_name(image)


def sides_of(pair: Pair) -> list[tuple[str, Item]]:
    """Query, positive and hard negatives, by their roles."""
    negatives = (("negative", negative) for negative in pair.negatives)
    return [("query", pair.query), ("positive", pair.positive), *negatives]


def _pairs_of(source: Any) -> tuple[Pairs, Pairs]:
    return Pairs.of(source.train_pairs()), Pairs.of(source.validation_pairs())


def right_answers(subset: EvalSubset) -> Iterator[Pair]:
    """Query and right answer of each row."""
    for row_id, query, candidates in zip(
        subset.row_ids, subset.query_index, subset.candidate_index, strict=True
    ):
        answer = subset.candidates[candidates[0]]
        yield Pair(subset.queries[query], answer, (), subset.name, row_id)
