"""Token lengths of the samples that a stage makes of its rows.

No image is opened again: its visual tokens follow from its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.items import IMAGE_SLOT, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.images import DistinctImages, Watch, in_workers
from cocoa_pl.stages.recipe import Stage

CHUNK = 256  # rows
MARKERS = 2  # tokens around each image: its start and its end
EOS = 1

_FIRST_EPOCH = 0


@dataclass(frozen=True)
class StageLengths:
    """Token lengths of the samples of stages that make the same samples of the same rows.

    Attributes:
        stages: the stages.
        num_rows: rows that the samples are made of.
        totals: int64 [N], tokens of each sample with EOS, before anything is cut.
        num_unknown: samples with an image that cannot be read.
        max_length: tokens of a sample that the model is given.
    """

    stages: Sequence[Stage]
    num_rows: int
    totals: np.ndarray
    num_unknown: int
    max_length: int

    @property
    def name(self) -> str:
        return ", ".join(stage.name for stage in self.stages)

    @property
    def num_cut(self) -> int:
        """Samples that are longer than the model is given."""
        return int((self.totals > self.max_length).sum())

    def tokens_per_step(self, stage: Stage) -> float:
        """Expected tokens of a step over all ranks, texts cut to `max_length`."""
        samples = len(self.totals) + self.num_unknown
        given = np.minimum(self.totals, self.max_length)
        per_row = samples / max(1, self.num_rows)
        return float(given.mean() * per_row * stage.batch_size) if len(given) else 0.0

    def passes_per_step(self, stage: Stage) -> float:
        """Expected forward passes of a step over all ranks, cut by the stage's token budget."""
        return self.tokens_per_step(stage) / stage.token_budget


def measure(
    stages: Sequence[Stage],
    rows: Sequence[Pair],
    processor: Processor,
    images: DistinctImages,
    findings: Findings,
    *,
    seed: int,
    workers: int,
    watch: Watch,
) -> StageLengths:
    """Lengths of the samples that training would make of these rows in its first epoch.

    Args:
        stages: make the same samples; the first one's name stands in findings.
        seed: of the first stage, as in training.
    """
    tokens = images.visual_tokens(processor)
    count = partial(_count, rows, stages[0].make_samples, processor, images, tokens, seed)
    counted = in_workers(count, range(len(rows)), chunk=CHUNK, workers=workers)
    label = f"lengths in {', '.join(stage.name for stage in stages)}"
    totals, num_unknown, limit = [], 0, processor.max_length
    for row_id, samples in watch(counted, label, len(rows)):
        for text, visual in samples:
            total = text + visual + EOS
            if visual < 0:
                num_unknown += 1
                continue
            totals.append(total)
            # Where the images alone are too long, the row has a finding of its own.
            if total > limit >= visual + EOS:
                message = (
                    f"{row_id}: {total} tokens in {stages[0].name}; "
                    f"max_length={limit} cuts {total - limit} of its text"
                )
                findings.add(Finding("truncated_text", "train", row_id, "", "", message))
    return StageLengths(stages, len(rows), np.array(totals, np.int64), num_unknown, limit)


def _count(
    rows: Sequence[Pair],
    make_samples: MakeSamples,
    processor: Processor,
    images: DistinctImages,
    tokens: np.ndarray,
    seed: int,
    numbers: Sequence[int],
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Of the rows of these numbers, in a worker process: the name, and of each sample the text
    tokens before anything is cut, and the visual tokens with their start and end; -1 of these where
    an image cannot be read.
    """
    counted = []
    for number in numbers:
        pair, samples = rows[number], []
        rng = np.random.default_rng(mix(seed, _FIRST_EPOCH, number))
        for context, target in make_samples(pair, rng):
            texts = [*context.text.split(IMAGE_SLOT), target or ""]
            visual = [int(tokens[images.number(image)]) for image in context.media]
            samples.append(
                (
                    sum(processor.count_text_tokens(text) for text in texts if text),
                    -1 if -1 in visual else sum(visual) + MARKERS * len(visual),
                )
            )
        counted.append((pair.row_id, samples))
    return counted
