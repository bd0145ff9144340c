"""The needs of one step of a stage on a set-up, for assumed lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from cocoa_pl.attention import Plan, make_plan
from cocoa_pl.data.batch import Batch, Collator, Sample
from cocoa_pl.data.masking import Masking
from cocoa_pl.errors import UserError
from cocoa_pl.planning import flops
from cocoa_pl.planning.flops import Costs
from cocoa_pl.planning.memory import ChunkLoad, Setup, memory_by_part
from cocoa_pl.planning.samples import Lengths, rank_rows
from cocoa_pl.planning.work import Work, work_of
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.recipe import Stage


@dataclass(frozen=True)
class StagePlan:
    """A stage on a set-up.

    Attributes:
        rows: of a step on this process.
        max_length: tokens of a sample that the model takes.
        rows_of_epoch: rows that the stage trains on; None if unknown.
    """

    stage: Stage
    setup: Setup
    lengths: Lengths
    max_length: int
    rows_of_epoch: int | None

    @property
    def rows(self) -> int:
        return math.ceil(self.stage.batch_size / self.setup.gpus)

    @property
    def steps(self) -> int:
        """Optimizer steps.

        Raises:
            UserError: if the stage counts epochs of an unknown number of rows.
        """
        if self.stage.steps is None and self.rows_of_epoch is None:
            raise UserError(
                f"stage {self.stage.name} counts epochs; say of how many rows: lengths.rows=100000"
            )
        return self.stage.count_steps(self.rows_of_epoch or 0)

    @cached_property
    def load(self) -> ChunkLoad:
        """The chunks of one step on one process."""
        contrasts, choices = _kind(self.stage)
        chunks = self._collator(_masked(self._rows(self.rows), choices))
        works: dict[bytes, Work] = {}  # most chunks are alike
        for chunk in chunks:
            if _signature(chunk) not in works:
                works[_signature(chunk)] = self._work(chunk)
        samples = sum(chunk.num_samples for chunk in chunks)
        candidates = (samples - self.rows) * self.setup.gpus
        ordered = [works[_signature(chunk)] for chunk in chunks]
        return ChunkLoad(
            works=ordered,
            decoder=bool(choices.get("patch_ratio")),
            cached=contrasts and len(chunks) > 1,
            rows=self.rows * contrasts,
            candidates=candidates * contrasts,
        )

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes on one GPU by part."""
        return memory_by_part(self.setup, self.load)

    @cached_property
    def costs(self) -> Costs:
        """Operations of one step on one GPU by part."""
        setup, load = self.setup, self.load
        known: dict[Work, Costs] = {}
        found: list[Costs] = []
        for number, work in enumerate(load.works):
            if work not in known:
                known[work] = flops.chunk_costs(
                    setup.shape,
                    setup.tuning,
                    work,
                    checkpointing=setup.checkpointing,
                    decoder=load.decoder,
                )
            found.append(known[work])
            if load.cached and number:
                found.append(flops.without_graph(known[work]))
        found.append(flops.norm_costs(setup.shape, setup.tuning))
        if load.rows:
            width = setup.shape.text.width
            found.append(
                flops.similarity_costs(width, queries=load.rows, candidates=load.candidates)
            )
        return flops.total(found)

    def seconds(self, peaks: Mapping[str, float], mfu: float) -> float:
        """Of one step.

        Args:
            peaks: dense TFLOP/s by the name of a type, `bfloat16` and `float32`.
            mfu: the fraction of them that is reached.
        """
        dtype = "bfloat16" if self.setup.width == 2 else "float32"
        return sum(
            cost.total / (peaks["float32" if part in flops.ALWAYS_FLOAT32 else dtype] * 1e12 * mfu)
            for part, cost in self.costs.items()
        )

    @property
    def tokens(self) -> int:
        """Of one step on one process."""
        return sum(work.tokens for work in self.load.works)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, below which no token budget helps."""
        rows = self._rows(min(self.rows, 64))
        return max(sample.num_tokens for row in rows for sample in row)

    def _rows(self, count: int) -> list[list[Sample]]:
        return rank_rows(
            self.stage.make_samples,
            self.lengths,
            rows=count,
            merge_size=self.setup.shape.vision.merge_size,
            max_length=self.max_length,
        )

    @property
    def _collator(self) -> Collator:
        def plan(segment_lengths: Tensor, grids: Tensor) -> tuple[Plan, dict[str, Any]]:
            return make_plan(self.stage.policy, segment_lengths), {}

        return Collator(plan, token_budget=self.stage.token_budget)

    def with_changes(self, setup: Setup, *, token_budget: int) -> StagePlan:
        """The same stage on another set-up."""
        stage = replace(self.stage, token_budget=token_budget)
        return StagePlan(stage, setup, self.lengths, self.max_length, self.rows_of_epoch)

    def _work(self, chunk: Batch) -> Work:
        return work_of(chunk, vision=self.setup.shape.vision, kernel=self.setup.kernel)


def _signature(chunk: Batch) -> bytes:
    """What the work of a chunk follows from."""
    return chunk.segment_lengths.numpy().tobytes() + chunk.grids.numpy().tobytes()


def _kind(stage: Stage) -> tuple[bool, Mapping[str, Any]]:
    """Whether a stage contrasts embeddings, and the values its config gives to its module."""
    module: Any = stage.module
    return issubclass(module.func, ContrastiveModule), module.keywords


def _masked(rows: list[list[Sample]], choices: Mapping[str, Any]) -> list[list[Sample]]:
    if "text_ratio" not in choices:
        return rows
    names = ("text_ratio", "text_segment", "patch_ratio")
    masking = Masking(**{name: choices[name] for name in names}, mask_token_id=0)
    rng = np.random.default_rng(0)
    return [[masking(sample, rng) for sample in row] for row in rows]
