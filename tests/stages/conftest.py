"""Captioned pictures, a tiny model, and runs of stages whose values come from conf/."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from PIL import Image
from torch import Tensor

from cocoa_pl.config.build import build
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sources import PairSource
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from cocoa_pl.run import build_stages, trainer_parts
from cocoa_pl.stages.recipe import RunSettings, Stage, run_stages
from cocoa_pl.stages.trainer import Parts
from tests.configs import composed

COLOURS = ("red", "green", "two", "old")
THINGS = ("dog", "cat", "sofa", "boats", "sea")
TRAINING_ROWS, VALIDATION_ROWS = 13, 5

MakeStages = Callable[..., list[Stage]]
Train = Callable[..., list[dict[str, Any]]]
ReadMetrics = Callable[[Path], list[tuple[str, str, str, str]]]


@pytest.fixture(scope="session")
def data(
    tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Image.Image]
) -> PairSource:
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
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    overrides = [
        *("data=pairs", f"data.path={root}/train.jsonl", f"data.image_root={root}"),
        *(f"data.validation_path={root}/validation.jsonl", "data.validation_fraction=0"),
        f"data.validation_rows={VALIDATION_ROWS}",
    ]
    source: PairSource = build(composed(*overrides).data)
    return source


@pytest.fixture(scope="session")
def make_stages() -> MakeStages:
    """The stages of conf/stage/*.yaml for a few steps of four rows."""

    def make(*overrides: str, steps: int = 3) -> list[Stage]:
        small = [
            f"stage.{name}.{key}"
            for name in ("pretrain", "warmup", "reconstruct", "contrast")
            for key in (
                *(f"steps={steps}", "batch_size=4"),
                *("optimization.warmup_steps=1", "optimization.lr=1e-3"),
            )
        ]
        shared = ["validate_every=2", "validation_batch_size=2", "token_budget=60"]
        return build_stages(composed(*small, *(f"stage.{o}" for o in shared), *overrides))

    return make


@pytest.fixture(scope="session")
def train(data: PairSource, processor: Processor) -> Train:
    """`run_stages` on the CPU with only metrics.csv as a logger.

    `trainer` are more words for the command line, as `+trainer.max_steps=3`.
    """

    def run(
        run_dir: Path,
        stages: Sequence[Stage],
        backbone: Backbone,
        *,
        resume: bool = False,
        num_workers: int = 0,
        checkpoint_every: int = 100,
        callbacks: Sequence[L.Callback] = (),
        trainer: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        export: str = "last",
        data: Any = data,
    ) -> list[dict[str, Any]]:
        def parts(stage: str) -> Parts:
            made = trainer_parts(composition, run_dir, stage)
            return made._replace(callbacks=[*made.callbacks, *callbacks])

        words = ("logger=none", "trainer=cpu", "trainer.log_every_n_steps=1", *trainer)
        composition = composed(*words)
        settings = RunSettings(
            run_dir=run_dir,
            parts=parts,
            config=config or {},
            seed=0,
            num_workers=num_workers,
            on_bad_row="fail",
            checkpoint_every=checkpoint_every,
            export=export,
        )
        return run_stages(stages, backbone, processor, data, settings, resume=resume)

    return run


@pytest.fixture(scope="session")
def fresh(load_tiny: Callable[..., Loaded]) -> Callable[[], Backbone]:
    """The same untrained backbone each time."""

    def make() -> Backbone:
        return load_tiny().backbone.requires_grad_(True)

    return make


@pytest.fixture(scope="session")
def read_metrics() -> ReadMetrics:
    """metrics.csv without the rates, which no two runs share."""

    def read(run_dir: Path) -> list[tuple[str, str, str, str]]:
        with (run_dir / "metrics.csv").open(newline="") as file:
            rows = [(r["stage"], r["step"], r["name"], r["value"]) for r in csv.DictReader(file)]
        return [row for row in rows if "per_second" not in row[2]]

    return read


@pytest.fixture(scope="session")
def weights() -> Callable[[Backbone], dict[str, Tensor]]:
    return partial(_copied)


def _copied(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in backbone.state_dict().items()}
