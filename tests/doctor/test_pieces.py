"""Parts of the doctor: token counts that equal the processor's, ordered work, facts of a report."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cocoa_pl.data.examples import CaptionExamples, PairExamples
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.doctor.check import Checkup
from cocoa_pl.doctor.measure import Images, count_tokens, in_workers, length_facts
from cocoa_pl.doctor.report import KEPT, facts_of
from cocoa_pl.errors import UserError
from tests.files import write_noise


def unwatched(values: Any, label: str, total: int) -> Any:
    return values


def images_of(items: list[Item]) -> Images:
    return Images(items, workers=0, watch=unwatched)


def random_pairs(folder: Path, count: int) -> list[Pair]:
    """Texts of several lengths with pictures of several sizes, on either side."""
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        sizes = rng.integers(10, 130, (2, 2)).tolist()
        image = write_noise(folder / f"{number}.png", tuple(sizes[0]), seed=number)
        words = " ".join(rng.choice(["a", "dog", "boats", "sleeping"], rng.integers(1, 9)))
        query = Item(f"look {IMAGE_SLOT} {words}", (image,)) if number % 3 else Item(words)
        pairs.append(Pair(query, Item(f"{words} {number}"), (), "Set", f"Set row {number}"))
    return pairs


@pytest.mark.parametrize("make_samples", [CaptionExamples(), PairExamples(max_negatives=1)])
def test_counted_tokens_are_those_of_samples(
    make_samples: Any, processor: Processor, tmp_path: Path
) -> None:
    """Counted from sizes and texts alone, they equal those of samples with opened pictures."""
    pairs = random_pairs(tmp_path, 30)
    images = images_of([pair.query for pair in pairs])
    counted = count_tokens(pairs, make_samples, processor, images, 3, range(30))
    assert [row_id for row_id, _ in counted] == [pair.row_id for pair in pairs]
    totals = [total for _, samples in counted for total in samples]
    samples = [
        processor(context, target, key=0, row_id=pair.row_id)
        for number, pair in enumerate(pairs)
        for context, target in make_samples(pair, np.random.default_rng(mix(3, 0, number)))
    ]
    # Nothing was cut here, or samples would be shorter than counted.
    assert max(sample.num_tokens for sample in samples) <= processor.max_length
    assert totals == [sample.num_tokens for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_work_comes_back_in_order(workers: int) -> None:
    results = in_workers(_squares, range(300), workers=workers)
    assert list(results) == [number**2 for number in range(300)]


def test_a_killed_worker_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"ran out; use fewer than workers=2"):
        list(in_workers(_die, range(300), workers=2))


def _squares(numbers: list[int]) -> list[int]:
    return [number**2 for number in numbers]


def _die(numbers: list[int]) -> list[int]:
    if 200 in numbers:
        os._exit(9)
    return numbers


def test_images_are_known_by_content(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "a.png", (20, 30), seed=0)
    content = path.read_bytes()
    media = (path, content, bytes(content), b"no picture", tmp_path / "none.png")
    items = [Item(IMAGE_SLOT, (image,)) for image in media]
    images = images_of(items)
    assert len(images) == 4
    assert images.sizes.tolist() == [[20, 30], [20, 30]]
    kinds = [error.kind for image in media if (error := images[image].error)]
    assert kinds == ["corrupt_image", "missing_image"]
    contents = [images.content_of(item) for item in items]
    assert contents[0] == contents[1] == contents[2]
    assert len(set(contents)) == 3


def facts(*found: UserError) -> dict[str, Any]:
    checkup = Checkup([], 0, 0, unwatched)
    checkup.found["train"].join(found)
    checkup.images = images_of([])
    return facts_of(checkup, [])


def test_findings_beyond_the_limit_are_counted() -> None:
    many = [UserError("a", kind="image_tag", row_id=f"row {n}") for n in range(KEPT + 7)]
    found = facts(*many)
    assert found["kinds"]["image_tag"]["count"] == KEPT + 7
    assert found["kinds"]["image_tag"]["listed"] == len(found["findings"]) == KEPT
    assert not found["stops_training"]
    assert facts(*many, UserError("b", kind="empty_text"))["stops_training"]


def test_an_error_of_no_known_kind_is_a_bad_row() -> None:
    """A source of one's own may hand over any."""
    found = facts(UserError("odd", row_id="row 3"))
    assert found["stops_training"]
    assert found["findings"] == [
        {"kind": "bad_row", "part": "train", "row_id": "row 3", "role": "", "file": ""}
        | {"message": "row 3: odd"}
    ]


def test_lengths_of_samples_and_of_steps() -> None:
    stage: Any = SimpleNamespace(name="stage", batch_size=8, token_budget=64)
    found = length_facts(stage, 50, [*range(100), 1000], num_unknown=1, max_length=100)
    quantiles = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 1000}
    assert (found["tokens"], found["samples"], found["cut"]) == (quantiles, 101, 1)
    # 102 samples of 50 rows, each of 50 tokens, and one that is cut to 100.
    mean = (sum(range(100)) + 100) / 101
    assert found["tokens_per_step"] == pytest.approx(mean * 102 / 50 * 8)
    assert found["passes"] == pytest.approx(found["tokens_per_step"] / 64)
