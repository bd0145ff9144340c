"""Runs of stages whose values come from conf/, on a tiny model and a few captioned pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sources import PairSource
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from cocoa_pl.run import build_stages, trainer_parts
from cocoa_pl.stages.recipe import Recipe, Stage
from cocoa_pl.stages.trainer import Parts
from tests.configs import composed
from tests.small import STAGES

Weights = dict[str, Tensor]


@dataclass
class Lab:
    """What every run of stages in these tests is made of."""

    data: PairSource
    processor: Processor
    load_tiny: Callable[..., Loaded]

    def stages(self, *overrides: str, steps: int = 3) -> list[Stage]:
        """The stages of conf/stage/*.yaml for a few steps of four rows."""
        small = [
            f"stage.{name}.{key}"
            for name in STAGES
            for key in (
                *(f"steps={steps}", "batch_size=4"),
                *("optimization.warmup_steps=1", "optimization.lr=1e-3"),
            )
        ]
        shared = ["validate_every=2", "validation_batch_size=2", "token_budget=60"]
        return build_stages(composed(*small, *(f"stage.{o}" for o in shared), *overrides))

    def fresh(self) -> Backbone:
        """The same untrained backbone each time."""
        return self.load_tiny().backbone.requires_grad_(True)

    def train(
        self,
        run_dir: Path,
        stages: Sequence[Stage],
        backbone: Backbone | None = None,
        *,
        resume: bool = False,
        num_workers: int = 0,
        checkpoint_every: int = 100,
        callbacks: Sequence[L.Callback] = (),
        trainer: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        export: str = "last",
        data: Any = None,
    ) -> list[dict[str, Any]]:
        """A `Recipe` on the CPU with only metrics.csv as a logger; the lineage.

        `trainer` are more words for the command line, as `+trainer.max_steps=3`.
        """

        def parts(stage: str) -> Parts:
            made = trainer_parts(composition, run_dir, stage)
            return made._replace(callbacks=[*made.callbacks, *callbacks])

        words = ("logger=none", "trainer=cpu", "trainer.log_every_n_steps=1", *trainer)
        composition = composed(*words)
        recipe = Recipe(
            stages=stages,
            backbone=backbone or self.fresh(),
            processor=self.processor,
            data=data or self.data,
            run_dir=run_dir,
            parts=parts,
            config=config or {},
            seed=0,
            num_workers=num_workers,
            on_bad_row="fail",
            checkpoint_every=checkpoint_every,
            export=export,
        )
        return recipe.run(resume=resume)


def weights_of(backbone: Backbone) -> Weights:
    return {name: value.detach().clone() for name, value in backbone.state_dict().items()}


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
