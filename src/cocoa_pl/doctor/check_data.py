"""Check everything that a training run would read, in the order of the data.

Rows are read by the training readers, images opened once each, lengths counted by the model's own
processor; the result does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cocoa_pl.data.examples import check_contrast
from cocoa_pl.data.items import Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import make_order, mix
from cocoa_pl.doctor.checks import (
    LeakageCheck,
    SideCheck,
    check_negatives,
    check_several_positives,
    pair_keys,
    sides_of_pair,
    sides_of_subset,
)
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.images import DistinctImages
from cocoa_pl.doctor.lengths import StageLengths, measure, visual_tokens
from cocoa_pl.doctor.reading import TRAIN, VALIDATION, Reading, Source
from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Stage

BLOCK = 1024  # rows between two reports of progress

Watch = Callable[[str, int], Callable[[int], None]]  # label, total -> advance by so many


@dataclass(frozen=True)
class Settings:
    """What is checked against.

    Args:
        stages: of the run, in order.
        processor, eval_processor: for training and evaluation; None if the model is not at hand.
        seed: of the run.
        workers: processes; 0 works in this one.
    """

    stages: Sequence[Stage]
    processor: Processor | None
    eval_processor: Processor | None
    seed: int
    workers: int


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
    reading: Reading, settings: Settings, findings: Findings, *, watch: Watch
) -> CheckedData:
    """Check what was read."""
    images = _open_images(reading, settings, watch)
    lengths = _check_stages(reading, settings, images, findings, watch)
    _check_sides(reading, settings, images, findings, watch)
    _check_contents(reading, images, findings, watch)
    readable = images.sizes[:, 0] > 0
    processor = settings.processor
    visual = visual_tokens(images, processor)[readable] if processor else np.empty(0, np.int64)
    rows = {name: len(rows) for source in reading.sources for name, rows in source.parts}
    if reading.benchmark_name:
        rows[reading.benchmark_name] = sum(len(s.row_ids) for s in reading.subsets)
    return CheckedData(findings, rows, len(images), images.sizes[readable], visual, lengths)


def _open_images(reading: Reading, settings: Settings, watch: Watch) -> DistinctImages:
    images = DistinctImages()
    for pair in reading.pairs:
        for side in sides_of_pair(pair):
            images.note(side.item)
    for subset in reading.subsets:
        for item in (*subset.queries, *subset.candidates):
            images.note(item)
    images.open_all(workers=settings.workers, advance=watch("images", len(images)))
    return images


def _check_stages(
    reading: Reading, settings: Settings, images: DistinctImages, findings: Findings, watch: Watch
) -> list[StageLengths]:
    """Each stage's rows and their lengths; stages that read alike are measured once."""
    rows_of: dict[int, Sequence[Pair]] = {}
    alike: dict[str, list[int]] = {}
    for source in reading.sources:
        for index in source.stages:
            stage = settings.stages[index]
            rows_of[index] = _rows_of_stage(stage, source, findings)
            made = (type(stage.make_samples).__name__, vars(stage.make_samples))
            what = (source.suffix, made, stage.describing, stage.max_rows_per_subset)
            alike.setdefault(repr(what), []).append(index)
    lengths = []
    for indices in alike.values():
        rows, stages = rows_of[indices[0]], [settings.stages[index] for index in indices]
        if not len(rows) or settings.processor is None:
            continue
        measured = measure(
            stages,
            rows,
            settings.processor,
            images,
            findings,
            seed=mix(settings.seed, indices[0]),
            workers=settings.workers,
            advance=watch(f"lengths in {', '.join(s.name for s in stages)}", len(rows)),
        )
        lengths.append(measured)
    return lengths


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
    reading: Reading, settings: Settings, images: DistinctImages, findings: Findings, watch: Watch
) -> None:
    check = SideCheck(images, settings.processor)
    parts = [part for source in reading.sources for part in source.parts]
    advance = watch("rows", sum(len(rows) for _, rows in parts))
    for name, rows in parts:
        for pair in _counted(rows, advance):
            for side in sides_of_pair(pair):
                check(side, findings, part=name)
    check = SideCheck(images, settings.eval_processor)
    for subset in reading.subsets:
        for side in sides_of_subset(subset):
            check(side, findings, part=reading.benchmark_name)


def _check_contents(
    reading: Reading, images: DistinctImages, findings: Findings, watch: Watch
) -> None:
    leaks = [
        LeakageCheck.of_pairs(VALIDATION + source.suffix, source.validation, images)
        for source in reading.sources
    ]
    if reading.benchmark_name:
        leaks.append(LeakageCheck.of_subsets(reading.benchmark_name, reading.subsets, images))
    advance = watch("overlap", sum(len(source.train) for source in reading.sources))
    for source in reading.sources:
        part, rows = source.parts[0]
        keys = pair_keys(rows, images)
        for pair, row_keys in zip(_counted(rows, advance), keys, strict=True):
            check_negatives(pair, row_keys, images, findings, part=part)
            for leak in leaks:
                leak.check(pair, (int(row_keys[0]), int(row_keys[1])), findings, part=part)
        check_several_positives(rows, keys, findings, part=part)


def _counted(rows: Sequence[Pair], advance: Callable[[int], None]) -> Iterator[Pair]:
    """The rows; `advance` is called once a block, because a million calls would be slow."""
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        yield from (rows[row] for row in range(start, stop))
        advance(stop - start)
