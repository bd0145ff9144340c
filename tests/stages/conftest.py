"""Captioned pictures, and a tiny model to train on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PIL import Image

from cocoa_pl.config.build import build
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.loading import Loaded
from tests.configs import composed
from tests.files import write_rows
from tests.stages.lab import Lab

COLOURS = ("red", "green", "two", "old")
THINGS = ("dog", "cat", "sofa", "boats", "sea")
TRAINING_ROWS, VALIDATION_ROWS = 13, 5


@pytest.fixture(scope="session")
def lab(
    tmp_path_factory: pytest.TempPathFactory,
    make_image: Callable[..., Image.Image],
    processor: Processor,
    load_tiny: Callable[..., Loaded],
) -> Lab:
    """Every picture has a caption of its own; validation has pictures that training never shows."""
    root = tmp_path_factory.mktemp("pictures")
    captions = [f"a {colour} {thing} near the sofa" for thing in THINGS for colour in COLOURS]
    rows = []
    for number, caption in enumerate(captions[: TRAINING_ROWS + VALIDATION_ROWS]):
        make_image((56, 56), seed=number).save(root / f"{number}.png")
        rows.append(
            {"query": "what is it", "query_image": f"{number}.png", "positive": caption},
        )
    for name, part in (("train", rows[:TRAINING_ROWS]), ("validation", rows[TRAINING_ROWS:])):
        write_rows(root / f"{name}.jsonl", part)
    overrides = [
        *("data=pairs", f"data.path={root}/train.jsonl", f"data.image_root={root}"),
        *(f"data.validation_path={root}/validation.jsonl", "data.validation_fraction=0"),
        f"data.validation_rows={VALIDATION_ROWS}",
    ]
    return Lab(build(composed(*overrides).data), processor, load_tiny)
