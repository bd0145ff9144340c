"""Check everything that a training run would read, in the order of the data.

Rows are read by the training readers, images opened once each, lengths counted by the model's own
processor; the result does not depend on the number of workers. Rows are compared by what they hold:
an image counts by the hash of its file, so that a copy under another name is the same image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cocoa_pl.data.examples import check_contrast
from cocoa_pl.data.items import EvalSubset, Item, Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import make_order, mix
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.images import TINY_SIDE, DistinctImages, Watch, file_name
from cocoa_pl.doctor.lengths import EOS, MARKERS, StageLengths, measure
from cocoa_pl.doctor.reading import TRAIN, VALIDATION, Reading, Source
from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Stage

# What other projects write where an image belongs: here it is words, unless the row has the image.
_IMAGE_TAG = re.compile(r"<\|?(?:image|img)(?:[ _-]?\d+)?\|?>", re.IGNORECASE)


@dataclass(frozen=True)
class CheckedData:
    """The result: findings, images and lengths.

    Attributes:
        rows: part of the data -> rows that can be used.
        sizes: int64 [N, 2] width and height of each distinct image that can be read.
        visual: int64 [N] their visual tokens; empty without a processor.
        lengths: of the samples of each kind of stage; empty without a processor.
    """

    findings: Findings
    rows: dict[str, int]
    num_images: int
    sizes: np.ndarray
    visual: np.ndarray
    lengths: Sequence[StageLengths]


def check_data(
    reading: Reading,
    stages: Sequence[Stage],
    findings: Findings,
    *,
    processors: Sequence[Processor],
    seed: int,
    workers: int,
    watch: Watch,
) -> CheckedData:
    """Check what was read.

    Args:
        stages: of the run, in order.
        processors: for training and for evaluation; none if the model is not at hand.
        seed: of the run.
        workers: processes; 0 works in this one.
        watch: passes values on and shows how many there were.
    """
    processor, eval_processor = processors or (None, None)
    images = DistinctImages()
    for _, pair in reading.pairs:
        for _, item in sides_of_pair(pair):
            images.note(item)
    for subset in reading.subsets:
        for item in (*subset.queries, *subset.candidates):
            images.note(item)
    images.open_all(workers=workers, watch=watch)

    lengths = []
    for first, rows, alike in _samples_of_stages(reading, stages, findings):
        if rows and processor:
            measured = measure(
                alike,
                rows,
                processor,
                images,
                findings,
                seed=mix(seed, first),
                workers=workers,
                watch=watch,
            )
            lengths.append(measured)

    num_rows = {name: len(rows) for source in reading.sources for name, rows in source.parts}
    shown = watch(reading.pairs, "rows", sum(num_rows.values()))
    sides = ((part, p.row_id, *side) for part, p in shown for side in sides_of_pair(p))
    _check_sides(sides, images, processor, findings)
    name = reading.benchmark_name
    sides = ((name, *side) for subset in reading.subsets for side in _sides_of_subset(subset))
    _check_sides(sides, images, eval_processor, findings)
    _check_contents(reading, images, findings, watch)
    readable = images.sizes[:, 0] > 0
    visual = images.visual_tokens(processor)[readable] if processor else np.empty(0, np.int64)
    if name:
        num_rows[name] = sum(len(subset.row_ids) for subset in reading.subsets)
    return CheckedData(findings, num_rows, len(images), images.sizes[readable], visual, lengths)


def sides_of_pair(pair: Pair) -> list[tuple[str, Item]]:
    """Query, positive and hard negatives, by their roles."""
    negatives = (("negative", negative) for negative in pair.negatives)
    return [("query", pair.query), ("positive", pair.positive), *negatives]


def _sides_of_subset(subset: EvalSubset) -> Iterator[tuple[str, str, Item]]:
    """Every distinct query and candidate once, named by the first row that holds it."""
    query_rows = np.zeros(len(subset.queries), dtype=np.int64)
    candidate_rows = np.zeros(len(subset.candidates), dtype=np.int64)
    for row in reversed(range(len(subset.row_ids))):
        query_rows[subset.query_index[row]] = row
        candidate_rows[subset.candidate_index[row]] = row
    for row, item in zip(query_rows.tolist(), subset.queries, strict=True):
        yield subset.row_ids[row], "query", item
    for row, item in zip(candidate_rows.tolist(), subset.candidates, strict=True):
        yield subset.row_ids[row], "candidate", item


def _samples_of_stages(
    reading: Reading, stages: Sequence[Stage], findings: Findings
) -> list[tuple[int, Sequence[Pair], list[Stage]]]:
    """Stages that make the same samples of the same rows, with these and the first one's place."""
    found: dict[str, tuple[int, Sequence[Pair], list[Stage]]] = {}
    for source in reading.sources:
        for index in source.stages:
            stage = stages[index]
            rows = _rows_of_stage(stage, source, findings)
            made = (type(stage.make_samples).__name__, vars(stage.make_samples))
            what = (source.suffix, made, stage.describing, stage.max_rows_per_subset)
            found.setdefault(repr(what), (index, rows, []))[2].append(stage)
    return list(found.values())


def _rows_of_stage(stage: Stage, source: Source, findings: Findings) -> Sequence[Pair]:
    """The rows that the stage would train on, and a finding if they are not enough."""
    rows = Pairs.of(source.train)
    if not rows:
        return rows  # the reader's error is a finding
    usable: Sequence[Pair] = []
    try:
        if stage.describing:
            rows = rows.describing(source.caption_subsets)
            if len(source.validation):
                Pairs.of(source.validation).describing(source.caption_subsets)
        rows = usable = rows.first_of_each_subset(stage.max_rows_per_subset)
        make_order(rows, stage.mixing, batch_size=stage.batch_size, seed=0)
        check_contrast(rows, stage.make_samples, batch_size=stage.batch_size)
    except UserError as error:
        message = f"stage {stage.name}: {error}"
        findings.add(Finding("too_few_rows", TRAIN + source.suffix, "", "", "", message))
    return usable


def _check_sides(
    sides: Iterable[tuple[str, str, str, Item]],
    images: DistinctImages,
    processor: Processor | None,
    findings: Findings,
) -> None:
    """Check each part, row, role and item alone."""
    tokens = images.visual_tokens(processor) if processor else None
    for part, row_id, role, item in sides:
        for kind, file, message in _faults(item, images, processor, tokens):
            text = f"{row_id}, {role}: {message}"
            findings.add(Finding(kind, part, row_id, role, file, text))


def _faults(
    item: Item, images: DistinctImages, processor: Processor | None, tokens: np.ndarray | None
) -> Iterator[tuple[str, str, str]]:
    """Kind, file and message of what is wrong with one side of a row.

    Args:
        tokens: visual ones of each image by the processor.
    """
    if found := _IMAGE_TAG.search(item.text):
        yield "image_tag", "", f"the text holds {found[0]}, which is read as words"
    numbers = [images.number(image) for image in item.media]
    for number, file in zip(numbers, map(file_name, item.media), strict=True):
        if fault := images.faults.get(number):
            yield fault[0], file, fault[1]
        elif images.sizes[number].min() < TINY_SIDE:
            width, height = images.sizes[number].tolist()
            size = f"image {file} is {width} x {height} pixels".replace("  ", " ")
            yield "tiny_image", file, size
    if processor and tokens is not None and numbers:
        needed = int(tokens[numbers].sum()) + MARKERS * len(numbers) + EOS
        if (tokens[numbers] >= 0).all() and needed > processor.max_length:
            yield (
                "images_exceed_length",
                file_name(item.media[0]),
                f"images and the end token take {needed} tokens, "
                f"more than max_length={processor.max_length}",
            )


def _check_contents(
    reading: Reading, images: DistinctImages, findings: Findings, watch: Watch
) -> None:
    """Hard negatives that are positives, training rows in an evaluation, several positives."""
    leaks = []
    for source in reading.sources:
        held_out = ((pair.query, pair.positive, pair.row_id) for pair in source.validation)
        leaks.append(_Overlap(VALIDATION + source.suffix, held_out, images))
    if reading.benchmark_name:
        # Queries and right answers; wrong candidates do not count.
        right = (
            (s.queries[query], s.candidates[candidates[0]], row_id)
            for s in reading.subsets
            for query, candidates, row_id in zip(
                s.query_index, s.candidate_index, s.row_ids, strict=True
            )
        )
        leaks.append(_Overlap(reading.benchmark_name, right, images))
    for source in reading.sources:
        part, rows = source.parts[0]
        keys = np.empty((len(rows), 2), np.int64)  # of each row's query and positive, by content
        for row, pair in enumerate(watch(rows, f"overlap{source.suffix}", len(rows))):
            query, positive = keys[row] = _pair_key(pair.query, pair.positive, images)
            for place, negative in enumerate(pair.negatives):
                if images.content_key(negative) == positive:
                    message = f"{pair.row_id}: negative {place} is the positive itself"
                    file = file_name(negative.media[0]) if negative.media else ""
                    kind = "negative_is_positive"
                    findings.add(Finding(kind, part, pair.row_id, "negative", file, message))
            for leak in leaks:
                if overlap := leak.of(pair, query, positive):
                    kind, file, what = overlap
                    message = f"{pair.row_id}: {what}"
                    findings.add(Finding(kind, part, pair.row_id, "", file, message))
        counts = pd.DataFrame(keys).groupby(0)[1].transform("nunique").to_numpy()
        for row in np.flatnonzero(counts > 1).tolist():
            row_id = rows[row].row_id
            message = f"{row_id}: its query has {counts[row]} different positives"
            findings.add(Finding("several_positives", part, row_id, "query", "", message))


class _Overlap:
    """What training rows share with an evaluation, by content.

    Args:
        name: of the evaluation.
        rows: its queries, right answers and names.
    """

    def __init__(
        self, name: str, rows: Iterable[tuple[Item, Item, str]], images: DistinctImages
    ) -> None:
        self.name = name
        self.images = images
        # By content: the row of the evaluation that holds it.
        self.row_of_query: dict[int, str] = {}
        self.row_of_pair: dict[tuple[int, int], str] = {}
        self.row_of_image: dict[int, str] = {}
        for query, positive, row_id in rows:
            key = _pair_key(query, positive, images)
            self.row_of_query.setdefault(key[0], row_id)
            self.row_of_pair.setdefault(key, row_id)
            for image in (*query.media, *positive.media):
                number = images.number(image)
                if number not in images.faults:
                    self.row_of_image.setdefault(int(images.digests[number]), row_id)

    def of(self, pair: Pair, query: int, positive: int) -> tuple[str, str, str] | None:
        """The strongest overlap of a row, its pair, its query or an image: kind, file, words."""
        if where := self.row_of_pair.get((query, positive)):
            return "overlap_pair", "", f"query and positive are in {self.name}, {where}"
        if where := self.row_of_query.get(query):
            return "overlap_query", "", f"the query is in {self.name}, {where}"
        for image in (*pair.query.media, *pair.positive.media):
            digest = int(self.images.digests[self.images.number(image)])
            if where := self.row_of_image.get(digest):
                return "overlap_image", file_name(image), f"an image is in {self.name}, {where}"
        return None


def _pair_key(query: Item, positive: Item, images: DistinctImages) -> tuple[int, int]:
    return images.content_key(query), images.content_key(positive)
