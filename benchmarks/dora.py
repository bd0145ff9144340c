"""B5. One adapted linear layer through the passes of an optimizer step: norms once a step and one
product with W, against both in every pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from benchmarks.benchmark import CUDA_IN_FLOAT32, SECONDS, Benchmark, Task, curve
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, torch_counts
from benchmarks.peers.dora import DoraLinear
from benchmarks.timing import Run
from cocoa_pl.models.dora import make_lean, shared_norms

RANK, ALPHA, DROPOUT = 8, 64, 0.1  # of the released scripts


@dataclass(frozen=True)
class Size:
    """A layer and the passes over it between two optimizer steps.

    Attributes:
        passes: micro-batches, or chunks of a gradient cache, of a step.
        dtype: of the frozen weight and of products; adapters are float32.
        dropout_on_base: keep peft's dropout in DoRA's second product with W.
    """

    fan_in: int
    fan_out: int
    tokens: int
    passes: int
    dtype: torch.dtype
    dropout_on_base: bool


class Dora(Task):
    """Forward and backward of all passes of a step, in training mode."""

    def __init__(self, size: Size, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.device, self.samples = size, device, size.passes * size.tokens

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = nn.Linear(size.fan_in, size.fan_out).to(device, size.dtype)
            self.model = adapted(base)
        make_lean(self.model, dropout_on_base=size.dropout_on_base)
        layer = self.model.base_model.model[0]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            b.copy_(0.02 * normal(*b.shape))  # as after some training
        magnitude = layer.lora_magnitude_vector["default"].weight
        self.theirs = DoraLinear(
            base, a=a, b=b, magnitude=magnitude, scaling=ALPHA / RANK, dropout=DROPOUT
        )
        self.inputs = [
            normal(size.tokens, size.fan_in).to(device, size.dtype).requires_grad_()
            for _ in range(size.passes)
        ]
        self.gradient = normal(size.tokens, size.fan_out).to(device, size.dtype)

    def _passes(self, layer: nn.Module) -> list[Tensor]:
        """The last output, and the gradients of the adapter and of the inputs."""
        leaves = [*(p for p in layer.parameters() if p.requires_grad), *self.inputs]
        for leaf in leaves:
            leaf.grad = None
        for x in self.inputs:
            with torch.autocast(
                self.device.type, dtype=self.size.dtype, enabled=self.size.dtype != torch.float32
            ):
                output = layer(x)
            output.backward(self.gradient.to(output.dtype))
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def peer(self) -> list[Tensor]:
        return self._passes(self.theirs)

    def ours(self) -> list[Tensor]:
        with shared_norms(self.model):
            return self._passes(self.model)

    def check(self) -> None:
        """Without dropout, whose draws differ."""
        for module in (self.model, self.theirs):
            module.eval()
        try:
            assert_close(self.ours(), self.peer(), dtype=self.size.dtype)
        finally:
            for module in (self.model, self.theirs):
                module.train()

    def floor(self) -> Run | None:
        """The same passes with LoRA: one product with W, forward and backward."""
        if self.size.dropout_on_base:
            return None
        lora = LoraLinear(self.theirs)
        return lambda: self._passes(lora)

    def counts(self) -> Counts:
        weights = [*self.model.parameters(), *self.theirs.parameters()]
        passes = self.size.passes
        counted = torch_counts(
            self.peer, self.ours, device=self.device, parameters=[*weights, *self.inputs]
        )
        return {"norms_taken": Count(passes, 1), **counted}


class LoraLinear(nn.Module):
    """A DoRA layer without its magnitudes."""

    def __init__(self, layer: DoraLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        dropped = dropout(x, self.layer.dropout)
        low_rank = linear(linear(dropped, self.layer.a), self.layer.b)
        return self.layer.base(x) + self.layer.scaling * low_rank


def adapted(base: nn.Linear) -> Any:
    """The layer as the only module of a peft model, with the adapter of the released scripts."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, use_dora=True, target_modules=["0"]
    )
    return peft.get_peft_model(nn.Sequential(base), config)


TEST = Size(64, 64, 48, 4, torch.float32, False)
CPU = Size(1536, 1536, 320, 4, torch.float32, False)  # a query projection of Qwen2-VL-2B
CUDA = Size(1536, 8960, 4096, 16, torch.bfloat16, False)  # its gate projection
IN_FLOAT32 = replace(CUDA, tokens=256, passes=2, dtype=torch.float32)

SIZES = {"test": TEST, "cpu": CPU, "cuda": CUDA, CUDA_IN_FLOAT32: IN_FLOAT32}

BENCHMARK = Benchmark(
    id="B5",
    name="dora",
    title="DoRA, dropout on the low-rank path only",
    peer_label="peft 0.11.1's DoRA, as CoCoA, MoCa and VLM2Vec use it",
    noun="tokens",
    # Half of the operations are gone (1.99x); dropout and elementwise work stay.
    target=2,
    note="All passes of one step over one layer, forward and backward, rank 8, dropout 0.1. Equal "
    "at dropout 0, where equality is asserted; with dropout, peft also drops inputs of a second "
    "product with W (adapter.dropout_on_base).",
    sizes=SIZES,
    build=Dora,
    curves=(
        curve(
            "tokens in a pass",
            SECONDS,
            "tokens",
            {"test": (12, 24), "cpu": (40, 80, 160, 320), "cuda": (512, 1024, 2048, 4096)},
            SIZES,
        ),
    ),
)

SAME_DROPOUT = replace(
    BENCHMARK,
    name="dora_same_dropout",
    title="DoRA, dropout as in peft",
    target=None,
    note="The same with adapter.dropout_on_base=true: the second product with W remains, only the "
    "norms are saved.",
    sizes={name: replace(size, dropout_on_base=True) for name, size in BENCHMARK.sizes.items()},
    curves=(),
)
