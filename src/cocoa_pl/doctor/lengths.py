"""Token lengths of the samples that a stage makes of its rows.

No image is opened again: its visual tokens follow from its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cocoa_pl.data.examples import Example, MakeSamples
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.images import DistinctImages, image_identity
from cocoa_pl.doctor.parallel import ordered_map
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
        text, visual: int64 [N], text tokens before anything is cut, and visual tokens with their
            start and end.
        num_unknown: samples with an image that cannot be read.
        max_length: tokens of a sample that the model is given.
    """

    stages: tuple[Stage, ...]
    num_rows: int
    text: np.ndarray
    visual: np.ndarray
    num_unknown: int
    max_length: int

    @property
    def name(self) -> str:
        return ", ".join(stage.name for stage in self.stages)

    @property
    def totals(self) -> np.ndarray:
        """int64 [N], tokens of each sample with EOS, before anything is cut."""
        return self.text + self.visual + EOS

    def tokens_per_step(self, stage: Stage) -> float:
        """Expected tokens of a step over all ranks, texts cut to `max_length`."""
        samples = len(self.text) + self.num_unknown
        given = np.minimum(self.totals, self.max_length)
        per_row = samples / max(1, self.num_rows)
        return float(given.mean() * per_row * stage.batch_size) if len(given) else 0.0

    def pieces_per_step(self, stage: Stage) -> float:
        """Expected forward passes of a step over all ranks, cut by the stage's token budget."""
        return self.tokens_per_step(stage) / stage.token_budget


def visual_tokens(images: DistinctImages, processor: Processor) -> np.ndarray:
    """int64 [N] visual tokens of each distinct image; -1 for those that cannot be read."""
    distinct, inverse = np.unique(images.sizes, axis=0, return_inverse=True)
    counts = [processor.count_visual_tokens(w, h) if w else -1 for w, h in distinct.tolist()]
    return np.array(counts, dtype=np.int64)[inverse.reshape(-1)]


def measure(
    stages: Sequence[Stage],
    rows: Sequence[Pair],
    processor: Processor,
    images: DistinctImages,
    findings: Findings,
    *,
    seed: int,
    workers: int,
    advance: Callable[[int], None],
) -> StageLengths:
    """Lengths of the samples that training would make of these rows in its first epoch.

    Args:
        stages: make the same samples; the first one's name stands in findings.
        seed: of the first stage, as in training.
        advance: is called with the number of rows that are done.
    """
    tokens = visual_tokens(images, processor)
    counted = ordered_map(
        _Counter(processor, stages[0].make_samples),
        _chunks(rows, images, tokens, seed=seed),
        workers=workers,
    )
    text: list[np.ndarray] = [np.empty(0, np.int64)]
    visual: list[np.ndarray] = [np.empty(0, np.int64)]
    num_unknown = 0
    limit = processor.max_length
    for part in counted:
        text.append(part.text)
        visual.append(part.visual)
        num_unknown += part.num_unknown
        totals = part.text + part.visual + EOS
        # Where the images alone are too long, the row has a finding of its own.
        for place in np.flatnonzero((totals > limit) & (part.visual + EOS <= limit)).tolist():
            message = (
                f"{part.row_ids[place]}: {totals[place]} tokens in {stages[0].name}; "
                f"max_length={limit} cuts {totals[place] - limit} of its text"
            )
            findings.add(Finding("truncated_text", "train", part.row_ids[place], "", "", message))
        advance(part.num_rows)
    return StageLengths(
        tuple(stages), len(rows), np.concatenate(text), np.concatenate(visual), num_unknown, limit
    )


@dataclass(frozen=True)
class _Rows:
    """A chunk: each row with its seed, and the visual tokens of all images in it."""

    rows: list[tuple[Pair, int]]
    visual: Mapping[str | bytes, int]


@dataclass(frozen=True)
class _Counts:
    text: np.ndarray
    visual: np.ndarray
    row_ids: list[str]
    num_unknown: int
    num_rows: int


@dataclass(frozen=True)
class _Counter:
    """Works in a worker process: rows in, lengths of their samples out."""

    processor: Processor
    make_samples: MakeSamples

    def __call__(self, chunk: _Rows) -> _Counts:
        text: list[int] = []
        visual: list[int] = []
        row_ids: list[str] = []
        num_unknown = 0
        for pair, seed in chunk.rows:
            for example in self.make_samples(pair, np.random.default_rng(seed)):
                tokens = [chunk.visual[image_identity(i)] for i in example[0].media]
                if -1 in tokens:
                    num_unknown += 1
                    continue
                text.append(self._text_tokens(example))
                visual.append(sum(tokens) + MARKERS * len(tokens))
                row_ids.append(pair.row_id)
        return _Counts(
            np.array(text, dtype=np.int64),
            np.array(visual, dtype=np.int64),
            row_ids,
            num_unknown,
            len(chunk.rows),
        )

    def _text_tokens(self, example: Example) -> int:
        context, target = example
        texts = [*context.text.split(IMAGE_SLOT), target or ""]
        return sum(self.processor.count_text_tokens(text) for text in texts if text)


def _chunks(
    rows: Sequence[Pair], images: DistinctImages, tokens: np.ndarray, *, seed: int
) -> Iterator[_Rows]:
    for start in range(0, len(rows), CHUNK):
        stop = min(start + CHUNK, len(rows))
        chunk = [(rows[row], mix(seed, _FIRST_EPOCH, row)) for row in range(start, stop)]
        used = {image for pair, _ in chunk for item in items_of(pair) for image in item.media}
        visual = {image_identity(i): int(tokens[images.number(i)]) for i in used}
        yield _Rows(chunk, visual)


def items_of(pair: Pair) -> tuple[Item, ...]:
    """Query, positive and hard negatives."""
    return (pair.query, pair.positive, *pair.negatives)
