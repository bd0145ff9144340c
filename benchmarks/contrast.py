"""B10 and B7. The loss and gradients of a gradient-cached InfoNCE step: all that the project does
against all that peers do, from pictures on.

Both sides have one core, or one GPU and the core that feeds it. What a data worker does for the
project (cutting images, packing, planning) is inside its time here, although it runs beside the
step elsewhere; the peer's image processor runs in its step anyway.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.attention_bridge import policy
from benchmarks.benchmark import SECONDS, Benchmark, Task, curve
from benchmarks.counting import Count, Counts
from benchmarks.peers.steps import contrast_step, in_chunks
from benchmarks.samples import draw, process, row_of
from benchmarks.step_sizes import CONTRAST, EVEN_TEXTS, WHOLE_BATCH, Size
from benchmarks.training import Ours, Peer, assert_same_step, cleared, counts_and_calls
from cocoa_pl.data.batch import Batch
from cocoa_pl.stages.contrastive import ContrastiveModule

TEMPERATURE = 0.02


class Contrast(Task):
    """A gradient-cached step: query with picture, positive text, temperature 0.02."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device, self.samples = size, device, size.batch
        shape = size.model.shape
        self.queries = draw(size.query, size.batch, shape=shape, seed=0)
        self.positives = draw(size.positive, size.batch, shape=shape, seed=1)
        self.own = Ours(size.model, device)
        self.theirs = Peer(size.model, self.own, attention="bidirectional", vision=size.peer_vision)
        self.module = self.own.stage(
            ContrastiveModule,
            policy=policy("bidirectional"),
            token_budget=size.token_budget,
            temperature=TEMPERATURE,
            learn_temperature=False,
            symmetric=False,
            mask_false_negatives=False,
            matryoshka_dims=(),
            similarity_block=1024,
        ).train()
        self.theirs.model.train()
        self.collate = self.module.collator(validating=False)
        self.peer_rows = [
            [row_of(drawn, process(drawn, self.own.processor, 0)) for drawn in side]
            for side in (self.queries, self.positives)
        ]

    def _batches(self) -> list[Batch]:
        pairs = enumerate(zip(self.queries, self.positives, strict=True))
        rows = [
            [process(one, self.own.processor, 2 * n + role, role) for role, one in enumerate(pair)]
            for n, pair in pairs
        ]
        found: list[Batch] = self.collate(rows)
        return found

    def ours(self) -> Tensor:
        cleared(self.module)
        loss: Tensor = self.module.accumulate(self._batches())["loss"]
        return loss

    def peer(self) -> Tensor:
        cleared(self.theirs.model)
        return contrast_step(
            self.theirs.model,
            *self.peer_rows,
            collate=self.theirs.collate,
            temperature=TEMPERATURE,
            pad_whole_batch=False,
        )

    def check(self) -> None:
        """Without dropout, whose draws differ."""
        assert_same_step(self, self.module, self.theirs.model)

    def counts(self) -> Counts:
        real = sum(batch.num_tokens for batch in self._batches())
        slots = sum(
            len(part) * max(len(row.input_ids) for row in part)
            for side in self.peer_rows
            for part in in_chunks(side)
        )
        return {
            "token_slots_per_real_token": Count(slots / real, 1.0),
            "head_rows": Count(2 * slots, 0),
            **counts_and_calls(self, self.theirs.model, self.module.backbone),
        }


BENCHMARK = Benchmark(
    id="B10",
    name="contrast_step",
    title="A contrastive step, from pictures to gradients",
    peer_label="CoCoA's contrastive stage: chunks of 8 padded each by itself, both towers in turn, "
    "peft 0.11.1's DoRA, the whole CausalLM forward pass, images processed in the step; vision "
    "attention image by image and patches embedded by a matrix product, both kinder than CoCoA's",
    noun="pairs",
    target=2.5,
    note="Gradient cache, DoRA of rank 8 with dropout 0.1 (off where equality is asserted) and "
    "adapter.dropout_on_base=false, temperature 0.02. Queries are a picture and a text, positives "
    "a text, of log-normal lengths. Only one chunk's graph is kept, and memory stays below the "
    "peer's.",
    sizes=CONTRAST,
    build=Contrast,
    curves=(
        curve(
            "pairs in the batch",
            SECONDS,
            "batch",
            {"test": (2, 4), "cpu": (2, 4, 8), "cuda": (8, 16, 32)},
            CONTRAST,
        ),
    ),
)

SAME_DROPOUT = replace(
    BENCHMARK,
    name="contrast_step_same_dropout",
    title="The same with dropout as in peft",
    target=None,
    note="With adapter.dropout_on_base=true, as it is by default.",
    sizes={
        name: replace(size, model=replace(size.model, dropout_on_base=True))
        for name, size in CONTRAST.items()
    },
    curves=(),
)

WHOLE_BATCH_ON_ONE = replace(
    BENCHMARK,
    name="contrast_step_1024",
    title="The same with the paper's 1,024 pairs on one device",
    sizes=WHOLE_BATCH,
    curves=(),
)

GRADIENT_CACHE = replace(
    BENCHMARK,
    id="B7",
    name="gradient_cache",
    title="The gradient cache alone",
    peer_label="VLM2Vec's and CoCoA's copies of GradCache: chunks of 8, both towers in turn, the "
    "whole CausalLM forward pass",
    target=None,
    note="Texts of one length, so that nothing is padded; all weights train (on a GPU, DoRA). "
    "One merged list of chunks by tokens, of which one keeps its graph.",
    sizes=EVEN_TEXTS,
    curves=(),
)
