"""B9. One rank's InfoNCE loss and gradients from the embeddings of a global batch: its own rows in
blocks, against the whole table on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.benchmark import Benchmark, Task, curve
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, torch_counts
from cocoa_pl.losses import info_nce

SCALE = 50.0  # a temperature of 0.02


@dataclass(frozen=True)
class Size:
    """A global batch, shared evenly by ranks.

    Attributes:
        block: rows of queries in memory together.
    """

    batch: int
    ranks: int
    width: int
    block: int


class Similarities(Task):
    """What one rank computes; other ranks' embeddings are there already."""

    def __init__(self, size: Size, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.device = size, device
        self.samples = size.batch // size.ranks

        def rows() -> Tensor:
            drawn = torch.randn(size.batch, size.width, generator=generator)
            return normalize(drawn, dim=1).to(device)

        self.queries = rows()
        # Hard enough that a loss is more than the rounding of logits.
        self.positives = normalize(self.queries + 5 * rows(), dim=1)
        self.scale = torch.tensor(SCALE, device=device)

    def _own(self, rank: int) -> slice:
        return slice(rank * self.samples, (rank + 1) * self.samples)

    def peer(self) -> list[Tensor]:
        """The mean over the whole table; gradients reach this rank's rows only."""
        own = self._own(0)
        own_rows = [rows[own].clone().requires_grad_() for rows in (self.queries, self.positives)]
        queries, positives = (
            torch.cat([part, rows[own.stop :]])
            for part, rows in zip(own_rows, (self.queries, self.positives), strict=True)
        )
        target = torch.arange(self.size.batch, device=self.device)
        loss = cross_entropy(queries @ positives.T * self.scale, target)
        return [loss.detach(), *torch.autograd.grad(loss, own_rows)]

    def ours(self) -> list[Tensor]:
        """This rank's rows of the table; gradients reach the candidates of all ranks."""
        return self._rank(0)

    def _rank(self, rank: int) -> list[Tensor]:
        own = self._own(rank)
        queries = self.queries[own].clone().requires_grad_()
        positives = self.positives.clone().requires_grad_()
        losses, *_ = info_nce(
            queries,
            positives,
            torch.arange(own.start, own.stop, device=self.device),
            self.scale,
            keys=None,
            block=self.size.block,
        )
        loss = losses.sum() / self.size.batch
        return [loss.detach(), *torch.autograd.grad(loss, [queries, positives])]

    def check(self) -> None:
        """Summed over ranks, as the collectives do: the loss, and rank 0's gradients."""
        ranks = [self._rank(rank) for rank in range(self.size.ranks)]
        loss = torch.stack([found[0] for found in ranks]).sum()
        candidates = torch.stack([found[2] for found in ranks]).sum(0)[self._own(0)]
        assert_close([loss, ranks[0][1], candidates], self.peer())

    def counts(self) -> Counts:
        counted = torch_counts(
            self.peer,
            self.ours,
            device=self.device,
            parameters=[self.queries, self.positives],
        )
        return {
            "similarities": Count(self.size.batch**2, self.samples * self.size.batch),
            **counted,
        }


TEST = Size(batch=64, ranks=4, width=16, block=8)
CPU = Size(batch=4096, ranks=8, width=256, block=128)
CUDA = Size(batch=32_768, ranks=8, width=1536, block=1024)


SIZES = {"test": TEST, "cpu": CPU, "cuda": CUDA}

BENCHMARK = Benchmark(
    id="B9",
    name="similarities",
    title="InfoNCE of one rank of eight",
    peer_label="CoCoA's loss.py: the whole table on every rank, gradients to its own rows",
    noun="queries",
    target=None,
    note="The table is not what limits a batch of 1,024; it is at 65,536. Forward and backward.",
    sizes=SIZES,
    build=Similarities,
    curves=(
        curve(
            "global batch",
            "peak_bytes",
            "batch",
            {
                "test": (32, 64, 128),
                "cpu": (512, 1024, 2048, 4096),
                "cuda": (4096, 8192, 16_384, 32_768),
            },
            SIZES,
        ),
    ),
)
