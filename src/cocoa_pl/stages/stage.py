"""What a config says about one stage, and what follows from it alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cocoa_pl.attention import Policy
from cocoa_pl.data.examples import MakeSamples
from cocoa_pl.data.mixing import Mixing
from cocoa_pl.data.tokenize import Processor
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
        UserError: unless exactly one of steps and epochs is given, and all counts are positive.
    """

    name: str
    module: Callable[..., StageModule]
    make_samples: MakeSamples
    describing: bool
    mixing: Mixing
    max_rows_per_subset: int | None
    batch_size: int
    validation_batch_size: int
    steps: int | None
    epochs: float | None
    validate_every: int
    policy: Policy
    optimization: Optimization
    token_budget: int

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"stage {self.name}: give either steps or epochs")
        positive = ("batch_size", "validation_batch_size", "validate_every", "token_budget")
        for field in (*positive, "steps" if self.epochs is None else "epochs"):
            if getattr(self, field) <= 0:
                raise UserError(f"stage {self.name}: {field} must be positive")

    def count_steps(self, num_rows: int | None) -> int:
        """Optimizer steps of the stage; `num_rows` is None for a stream.

        Raises:
            UserError: for epochs of a stream.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if num_rows is None:
            raise UserError(
                f"stage {self.name}: a stream has no length, so epochs cannot be counted; "
                f"give steps (schedule.{self.name}.steps=... schedule.{self.name}.epochs=null)"
            )
        return max(1, math.floor(self.epochs * (num_rows // self.batch_size)))

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
