"""B10 and B4. Vectors of items, without gradients: packed by a token budget, against rows padded to
their longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attention_bridge import policy
from benchmarks.benchmark import Benchmark, Task, curve
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts
from benchmarks.peers.inputs import Inputs
from benchmarks.peers.steps import CHUNK
from benchmarks.samples import draw, process, row_of
from benchmarks.step_sizes import ITEMS, SKEWED_TEXTS, Size
from benchmarks.training import Ours, Peer, counts_and_calls
from cocoa_pl.data.batch import Collator, Sample


class Encode(Task):
    """Vectors of queries with pictures, merged weights, no gradients."""

    peer_batch = 4  # of CoCoA's eval.sh

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device, self.samples = size, device, size.batch
        self.items = draw(size.query, size.batch, shape=size.model.shape, seed=0)
        self.own = Ours(size.model, device)
        self.theirs = Peer(size.model, self.own, attention="bidirectional", vision=size.peer_vision)
        plan = self.own.backbone.eval().planner(policy("bidirectional"))
        self.collate = Collator(plan, token_budget=size.token_budget)
        self.theirs.model.eval()
        self.peer_rows = list(map(row_of, self.items, self._samples()))

    def _samples(self) -> list[Sample]:
        return [process(item, self.own.processor, n) for n, item in enumerate(self.items)]

    @torch.inference_mode()
    def ours(self) -> Tensor:
        """As `Embedder` does: batches of a token budget, samples of like cost together."""
        batches = self.collate([[sample] for sample in self._samples()])
        vectors = [self.own.backbone.embed(batch.to(self.device)) for batch in batches]
        return torch.cat(vectors)[torch.cat([batch.places for batch in batches]).argsort()]

    @torch.inference_mode()
    def peer(self) -> Tensor:
        rows, size = self.peer_rows, self.peer_batch
        return torch.cat(
            [
                self.theirs.model.embed(self.theirs.collate(rows[start : start + size]))
                for start in range(0, len(rows), size)
            ]
        )

    def check(self) -> None:
        assert_close([self.ours()], [self.peer()], dtype=self.size.model.dtype)

    def counts(self) -> Counts:
        return counts_and_calls(self, self.theirs.model, self.own.backbone)


class Packing(Encode):
    """Whole batches padded to their longest before they are cut, as VLM2Vec-V2's collator does;
    without its vocabulary head, so that padding alone makes the difference.
    """

    def _inputs(self) -> list[Inputs]:
        return self.theirs.collate(self.peer_rows).split(CHUNK)

    @torch.inference_mode()
    def peer(self) -> Tensor:
        return torch.cat([self.theirs.model.embed_without_head(chunk) for chunk in self._inputs()])

    def counts(self) -> Counts:
        slots = sum(chunk.slots for chunk in self._inputs())
        real = sum(len(row.input_ids) for row in self.peer_rows)
        return {"token_slots_per_real_token": Count(slots / real, 1.0), **super().counts()}


BENCHMARK = Benchmark(
    id="B10",
    name="encode",
    title="Vectors of pictures with texts",
    peer_label="VLM2Vec's and CoCoA's eval.py: batches of 4 in the order of the data set, padded, "
    "the whole CausalLM forward pass, vision attention image by image and patches embedded by a "
    "matrix product",
    noun="items",
    target=None,
    note="From pictures to vectors on one core or one GPU; nothing overlaps here.",
    sizes=ITEMS,
    build=Encode,
    curves=(),
)

PACKING = Benchmark(
    id="B4",
    name="packing",
    title="Token budgets instead of padding",
    peer_label="VLM2Vec-V2: a device's batch is padded to its longest, then cut into chunks of 8; "
    "without its vocabulary head",
    noun="texts",
    target=1.5,
    note="Texts of log-normal lengths, median 24 (spread 0.8). A forward pass.",
    sizes=SKEWED_TEXTS,
    build=Packing,
    curves=(
        curve(
            "texts in the batch",
            "flops",
            "batch",
            {"test": (6, 12), "cpu": (8, 16, 32), "cuda": (64, 128, 256)},
            SKEWED_TEXTS,
        ),
    ),
)
