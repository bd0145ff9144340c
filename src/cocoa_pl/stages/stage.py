"""What a config says about one stage, and what follows from it alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cocoa_pl.attention import Policy
from cocoa_pl.config.bounds import Count, Positive
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import Mixing
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.stages.base import Optimization, StageModule


@dataclass(frozen=True)
class Stage:
    """One stage, as its config says.

    Args:
        module: makes the stage's module of a backbone and a processor.
        make_samples: what the stage makes of a pair.
        describing: use only pairs of an image and its text, of the data's caption subsets.
        mixing: how batches are composed of subsets.
        max_rows_per_subset: training rows used of each subset, from the first on; None for all.
        batch_size: rows of a step over all ranks.
        steps, epochs: how long; exactly one is given.
        validate_every: steps between validations; there is always one at the end.
        policy: attention while it trains.

    Raises:
        UserError: unless exactly one of steps and epochs is given, or for a warm-up that is longer.
    """

    name: str
    module: Callable[..., StageModule]
    make_samples: MakeSamples
    describing: bool
    mixing: Mixing
    max_rows_per_subset: Count | None
    batch_size: Count
    validation_batch_size: Count
    steps: Count | None
    epochs: Positive | None
    validate_every: Count
    policy: Policy
    optimization: Optimization
    token_budget: Count

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"stage {self.name}: give either steps or epochs")
        if self.steps is not None:
            self.count_steps(None)

    def count_steps(self, num_rows: int | None) -> int:
        """Optimizer steps of the stage; `num_rows` is None for a stream.

        Raises:
            UserError: for epochs of a stream, or a warm-up that is longer than the stage.
        """
        steps = self.steps
        if steps is None:
            assert self.epochs is not None
            if num_rows is None:
                raise UserError(
                    f"stage {self.name}: a stream has no length, so epochs cannot be counted; "
                    f"give steps (schedule.{self.name}.steps=... schedule.{self.name}.epochs=null)"
                )
            steps = max(1, math.floor(self.epochs * (num_rows // self.batch_size)))
        if self.optimization.warmup_steps > steps:
            raise UserError(
                f"stage {self.name}: a warm-up of {self.optimization.warmup_steps} steps is longer "
                f"than its {steps} steps; lower schedule.{self.name}.warmup_steps"
            )
        return steps

    def make_module(
        self, backbone: Backbone, processor: Processor, *, steps: int, seed: int
    ) -> StageModule:
        """The stage's module around a backbone, in training mode, which from_pretrained leaves."""
        return self.module(
            backbone,
            processor=processor,
            policy=self.policy,
            optimization=self.optimization,
            token_budget=self.token_budget,
            steps=steps,
            seed=seed,
        ).train()

    def described(self, *, num_rows: int | None, steps: int) -> str:
        """One line for the log; `num_rows` is None for a stream."""
        rows = "streamed" if num_rows is None else num_rows
        return (
            f"{rows} rows, {steps} steps of {self.batch_size}, "
            f"attention {self.policy.name}, lr {self.optimization.lr:g}"
        )
