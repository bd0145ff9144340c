"""Parts of the doctor: lengths that equal the processor's, ordered work, bars, row errors."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.data.examples import CaptionExamples, PairExamples
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.doctor.findings import (
    KEPT,
    KINDS,
    Finding,
    Findings,
    Severity,
)
from cocoa_pl.doctor.images import DistinctImages, in_workers
from cocoa_pl.doctor.lengths import measure
from cocoa_pl.doctor.report import NUM_BINS, bar, make_bins
from cocoa_pl.errors import UserError

from .conftest import noise


class OneStage:
    """As much of a stage as lengths are measured by."""

    def __init__(self, make_samples: Any) -> None:
        self.name = "stage"
        self.make_samples = make_samples
        self.batch_size = 8
        self.token_budget = 64


def unwatched(values: Any, label: str, total: int) -> Any:
    return values


def random_pairs(folder: Path, count: int) -> list[Pair]:
    """Texts of several lengths with pictures of several sizes, on either side."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        sizes = rng.integers(10, 130, (2, 2)).tolist()
        image = noise(folder / f"{number}.png", tuple(sizes[0]), seed=number)
        words = " ".join(rng.choice(["a", "dog", "boats", "sleeping"], rng.integers(1, 9)))
        query = Item(f"look {IMAGE_SLOT} {words}", (image,)) if number % 3 else Item(words)
        pairs.append(Pair(query, Item(f"{words} {number}"), (), "Set", f"Set row {number}"))
    return pairs


@pytest.mark.parametrize("make_samples", [CaptionExamples(), PairExamples(max_negatives=1)])
def test_lengths_are_those_of_samples(
    make_samples: Any, processor: Processor, tmp_path: Path
) -> None:
    """Counted from sizes and texts alone, they equal those of samples with opened pictures."""
    pairs, images = random_pairs(tmp_path, 30), DistinctImages()
    for pair in pairs:
        images.note(pair.query)
    images.open_all(workers=0, watch=unwatched)
    stages: Any = [OneStage(make_samples)]
    measured = measure(
        stages,
        pairs,
        processor,
        images,
        Findings(),
        seed=3,
        workers=0,
        watch=unwatched,
    )
    samples = [
        processor(context, target, key=0, row_id=pair.row_id)
        for number, pair in enumerate(pairs)
        for context, target in make_samples(pair, np.random.default_rng(mix(3, 0, number)))
    ]
    # Nothing was cut here, or samples would be shorter than counted.
    assert max(measured.totals) <= processor.max_length
    assert measured.totals.tolist() == [sample.num_tokens for sample in samples]
    total = sum(sample.num_tokens for sample in samples) / len(pairs) * 8
    assert measured.tokens_per_step(stages[0]) == pytest.approx(total)
    assert measured.passes_per_step(stages[0]) == pytest.approx(total / 64)


@pytest.mark.parametrize("workers", [0, 2])
def test_work_comes_back_in_order(workers: int) -> None:
    results = in_workers(_squares, range(40), chunk=3, workers=workers)
    assert list(results) == [number**2 for number in range(40)]


def test_a_killed_worker_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"ran out; use fewer than workers=2"):
        list(in_workers(_die, range(8), chunk=1, workers=2))


def _squares(numbers: list[int]) -> list[int]:
    return [number**2 for number in numbers]


def _die(numbers: list[int]) -> list[int]:
    if 3 in numbers:
        os._exit(9)
    return numbers


def test_embedded_images_are_identified_by_their_bytes(tmp_path: Path) -> None:
    content = noise(tmp_path / "a.png", (20, 30), seed=0).read_bytes()
    items = [Item(IMAGE_SLOT, (image,)) for image in (content, bytes(content), b"no picture")]
    images = DistinctImages()
    for item in items:
        images.note(item)
    images.open_all(workers=0, watch=unwatched)
    assert images.sizes.tolist() == [[20, 30], [0, 0]]
    assert [kind for kind, _ in images.faults.values()] == ["corrupt_image"]
    assert images.content_key(items[0]) == images.content_key(items[1])
    assert images.content_key(items[0]) != images.content_key(items[2])


def test_findings_beyond_the_limit_are_counted() -> None:
    findings = Findings()
    for number in range(KEPT + 7):
        findings.add(Finding("tiny_image", "train", f"Set row {number}", "", "", ""))
    assert findings.counts["tiny_image"] == KEPT + 7
    assert len(findings.kept["tiny_image"]) == KEPT
    assert not findings.stops_training
    findings.add(Finding("empty_text", "train", "Set row 0", "", "", ""))
    assert findings.stops_training


@pytest.mark.parametrize("longest", [1, 7, 12, 100, 4096])
def test_every_length_is_in_one_bin(longest: int) -> None:
    lengths = np.random.default_rng(0).integers(1, longest + 1, 500)
    lengths[0] = 10 * longest  # an outlier does not stretch the axis
    bins = make_bins(lengths)
    assert bins.counts(lengths).sum() == 500
    assert len(bins.labels) == len(bins.edges) - 1 <= NUM_BINS
    assert bins.is_open == (lengths.max() >= bins.edges[-1])
    for place, (low, high) in enumerate(zip(bins.edges, bins.edges[1:], strict=False)):
        inside = (lengths >= low) & (lengths < high)
        if place < len(bins.labels) - 1:
            assert bins.counts(lengths)[place] == inside.sum()


def test_every_kind_of_finding_is_documented_under_its_severity() -> None:
    page = (CONFIGS.parent / "docs" / "doctor.md").read_text().partition("## Lengths")[0]
    starts = [page.index(f"*{word}") for word in ("Stops training*", "Loses rows", "Information*")]
    for severity, start, stop in zip(Severity, starts, [*starts[1:], None], strict=True):
        rows = [line for line in page[start:stop].splitlines() if line.startswith("| `")]
        named = {kind for line in rows for kind in re.findall(r"`(\w+)`", line.split(" | ")[0])}
        assert named == {kind for kind, about in KINDS.items() if about.severity is severity}


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(0.0, width=8) == ""
    assert bar(1e-9, width=8) == "▏"
    assert bar(0.5, width=8) == "████"
    assert bar(0.55, width=10) == "█████▌"
    assert bar(1.0, width=8) == "████████"
