"""What one step of a stage needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cocoa_pl.batch import Batch, cut_by_cost
from cocoa_pl.corruption import Corruption
from cocoa_pl.errors import UserError
from cocoa_pl.planning import flops
from cocoa_pl.planning.flops import Costs
from cocoa_pl.planning.memory import ChunkLoad, Setup, count_kept, graph, memory_by_part
from cocoa_pl.planning.samples import Lengths, rank_batch
from cocoa_pl.planning.work import Work, work_of
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.stage import Stage


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
        vision = self.setup.shape.vision
        batch = rank_batch(
            self.stage.make_samples,
            self.lengths,
            rows=self.rows,
            merge_size=vision.merge_size,
            max_length=self.max_length,
        )
        pieces = cut_by_cost(batch.lengths, batch.costs, self.stage.token_budget)
        chunks = [batch.take(piece) for piece in pieces]
        contrasts, choices = _kind(self.stage)
        works: dict[bytes, Work] = {}  # most chunks are alike
        for chunk in chunks:
            if _signature(chunk) not in works:
                works[_signature(chunk)] = self._work(chunk, choices)
        candidates = (batch.num_samples - self.rows) * self.setup.gpus
        ordered = [works[_signature(chunk)] for chunk in chunks]
        decoder = bool(choices.get("patch_ratio"))
        kept = 1
        if contrasts:
            sizes = {work: graph(self.setup, decoder, work).total for work in works.values()}
            keep_bytes = int(choices["keep_gib"] * 2**30)
            kept = count_kept([sizes[work] for work in ordered], keep_bytes)
        return ChunkLoad(
            works=ordered,
            decoder=decoder,
            cached=contrasts and len(chunks) > 1,
            kept=kept,
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
            if load.cached and number >= load.kept:
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
        rows = min(self.rows, 64)
        vision = self.setup.shape.vision
        batch = rank_batch(
            self.stage.make_samples,
            self.lengths,
            rows=rows,
            merge_size=vision.merge_size,
            max_length=self.max_length,
        )
        return int(batch.lengths.max())

    def with_changes(self, setup: Setup, *, token_budget: int) -> StagePlan:
        """The same stage on another set-up."""
        stage = replace(self.stage, token_budget=token_budget)
        return StagePlan(stage, setup, self.lengths, self.max_length, self.rows_of_epoch)

    def _work(self, chunk: Batch, choices: Mapping[str, Any]) -> Work:
        predicted, rebuilt = _hidden(chunk, choices, self.setup.shape.vision.merge_size)
        return work_of(
            chunk,
            policy=self.stage.policy,
            vision=self.setup.shape.vision,
            kernel=self.setup.kernel,
            predicted=predicted,
            rebuilt=rebuilt,
            read=_read(chunk, choices, predicted),
        )


def _signature(chunk: Batch) -> bytes:
    """What the work of a chunk follows from."""
    return chunk.segment_lengths.numpy().tobytes() + chunk.images_per_sample.numpy().tobytes()


def _kind(stage: Stage) -> tuple[bool, Mapping[str, Any]]:
    """Whether a stage contrasts embeddings, and the values its config gives to its module."""
    module: Any = stage.module
    return issubclass(module.func, ContrastiveModule), module.keywords


def _hidden(chunk: Batch, choices: Mapping[str, Any], merge_size: int) -> tuple[int, int]:
    """How many tokens are to be predicted and how many visual tokens to be rebuilt."""
    if "text_ratio" not in choices:
        return 0, 0
    hidden = Corruption(
        text_ratio=choices["text_ratio"],
        text_segment=choices["text_segment"],
        patch_ratio=choices["patch_ratio"],
        mask_token_id=0,
        merge_size=merge_size,
    )(chunk)
    return int(hidden.token_mask.sum()), int(hidden.patch_mask.sum())


def _read(chunk: Batch, choices: Mapping[str, Any], predicted: int) -> int:
    """Rows of the last layer: EOS of each sample, the states that predict, or all for the image
    decoder.
    """
    if "text_ratio" not in choices:
        return chunk.num_samples
    return chunk.num_tokens if choices["patch_ratio"] else predicted
