"""Samples of a given shape; a small folder in the hub's layout, and streams of it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from cocoa_pl.data.batch import SPECIAL, TEXT, VISUAL, Sample
from cocoa_pl.data.sources import PairSource
from tests.configs import composed
from tests.files import write_noise

ROWS = {"A": 23, "B": 17, "E": 12}

DataConfig = Callable[[str], dict[str, Any]]
MakeSource = Callable[..., PairSource]


@pytest.fixture(scope="session")
def sample_of() -> Callable[..., Sample]:
    """A sample with given segment lengths, which begins with an image of some visual tokens."""

    def make(context: int, target: int = 0, *, bottleneck: int = 1, visual: int = 0) -> Sample:
        tokens = context + bottleneck + target
        kinds = np.full(tokens, TEXT, np.uint8)
        kinds[:visual] = VISUAL
        kinds[context : context + bottleneck] = SPECIAL
        return Sample(
            input_ids=np.arange(10, 10 + tokens),
            kinds=kinds,
            position_ids=np.broadcast_to(np.arange(tokens), (3, tokens)),
            segment_lengths=(context, bottleneck, target),
            patches=np.random.default_rng(tokens).integers(0, 256, (4 * visual, 588), np.uint8),
            grids=((1, 2, 2 * visual),) if visual else (),
            key=0,
            row_id="toy",
        )

    return make


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subsets A and B with images in files, E with embedded ones; a legacy file beside each."""
    root = tmp_path_factory.mktemp("hub")
    for subset in "AB":
        for number in range(ROWS[subset]):
            write_noise(root / f"images/{subset}{number}.png", seed=number)
        _write(root / subset, [_row(subset, number) for number in range(ROWS[subset])])
    _write_embedded(
        root / "E", [(root / f"images/A{n}.png").read_bytes() for n in range(ROWS["E"])]
    )
    return root


@pytest.fixture(scope="session")
def data_config() -> DataConfig:
    """The composed values of conf/data/NAME.yaml, as plain Python; open ones are `???`."""

    @cache
    def values(name: str) -> Any:
        return OmegaConf.to_container(composed(f"data={name}").data)

    return lambda name: deepcopy(values(name))


@pytest.fixture(scope="session")
def pair_source(data_config: DataConfig) -> MakeSource:
    """What `data=NAME` builds, with some values replaced; nothing is held out."""

    def make(name: str, **changes: Any) -> PairSource:
        config = data_config(name)
        assert config.pop("_target_") == "cocoa_pl.data.sources.PairSource"
        config |= {"on_bad_row": "fail", "validation_fraction": 0}
        return PairSource(**(config | changes))

    return make


@pytest.fixture(scope="session")
def make_stream(hub_folder: Path, pair_source: MakeSource) -> Callable[..., PairSource]:
    """`data=mmeb_stream` of that folder."""

    def make(**changes: Any) -> PairSource:
        values: dict[str, Any] = {
            "path": str(hub_folder),
            "subsets": ["A", "B"],
            "image_root": str(hub_folder),
            "window": 4,
            "caption_subsets": ["A"],
            "validation_rows": 0,
        }
        return pair_source("mmeb_stream", **(values | changes))

    return make


def _row(subset: str, number: int) -> dict[str, str]:
    return {
        "qry": f"<|image_1|>\nFind caption {number}",
        "qry_image_path": f"images/{subset}{number}.png",
        "pos_text": f"{subset} {number}",
        "pos_image_path": "",
    }


def _write(folder: Path, rows: list[dict[str, str]]) -> None:
    """Two files of row groups of five rows, and a legacy file that is of no split."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(rows)), 2)):
        table = pa.Table.from_pylist([rows[row] for row in part])
        pq.write_table(table, folder / f"original-{number:05}-of-00002.parquet", row_group_size=5)
    pq.write_table(pa.table({"other": [1]}), folder / "train-00000-of-00001.parquet")


def _write_embedded(folder: Path, images: list[bytes]) -> None:
    """As `datasets` itself writes its Image feature."""
    count = len(images)
    rows: dict[str, list[Any]] = {
        "qry": ["<|image_1|>\nFind the caption"] * count,
        "qry_image_path": [{"bytes": image, "path": None} for image in images],
        "pos_text": [f"E {number}" for number in range(count)],
        "pos_image_path": [""] * count,
    }
    features = datasets.Features(
        {name: datasets.Value("string") for name in rows} | {"qry_image_path": datasets.Image()}
    )
    folder.mkdir()
    embedded = datasets.Dataset.from_dict(rows, features=features)
    embedded.to_parquet(str(folder / "original-00000-of-00001.parquet"))
