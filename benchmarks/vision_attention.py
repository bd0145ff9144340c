"""B3. The vision tower's attention and its gradients: image by image, against one product over all
images under a dense mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.attention_bridge import computed_scores, kernel_of
from benchmarks.benchmark import CUDA_IN_FLOAT32, SECONDS, Benchmark, Task, curve
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, torch_counts
from benchmarks.peers.attention import vision_attention
from cocoa_pl.attention import Plan, attend, self_plan


@dataclass(frozen=True)
class Size:
    """Images of one size.

    Attributes:
        side: patches of a side; 32 for 448 pixels.
        fold_batch: how the peer calls SDPA; see `peers.attention.vision_attention`.
    """

    images: int
    side: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    kernel: str
    fold_batch: bool


class VisionAttention(Task):
    """One block of the tower, forward and backward; the mask, or the plan, is made in every run."""

    def __init__(self, size: Size, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.device, self.samples = size, device, size.images
        self.patches = torch.full((size.images,), size.side**2)
        self.cumulative = torch.nn.functional.pad(self.patches.cumsum(0), (1, 0)).to(device)
        shape = (int(self.patches.sum()), size.heads, size.head_dim)
        self.states = [
            torch.randn(shape, generator=generator).to(device, size.dtype).requires_grad_()
            for _ in range(3)
        ]
        self.gradient = torch.randn(shape, generator=generator).to(device, size.dtype)

    def peer(self) -> list[Tensor]:
        output = vision_attention(
            *self.states, cumulative=self.cumulative, fold_batch=self.size.fold_batch
        )
        return [output.detach(), *torch.autograd.grad(output, self.states, self.gradient)]

    def plan(self) -> Plan:
        """Made anew in every step."""
        kernel = kernel_of(self.size, self.device)
        return self_plan(self.patches).prepared(kernel).to(self.device)

    def ours(self) -> list[Tensor]:
        query, key, value = self.states
        scale = self.size.head_dim**-0.5
        output = attend(query, key, value, self.plan(), kernel=self.size.kernel, scale=scale)
        return [output.detach(), *torch.autograd.grad(output, self.states, self.gradient)]

    def check(self) -> None:
        assert_close(self.ours(), self.peer())

    def counts(self) -> Counts:
        peer, ours = int(self.patches.sum()) ** 2, computed_scores(self.plan())
        counted = torch_counts(self.peer, self.ours, device=self.device)
        return {"scores": Count(peer, ours), **counted}


TEST = Size(8, 4, 2, 8, torch.float32, "sdpa", True)
CPU = Size(8, 16, 4, 80, torch.float32, "sdpa", True)  # heads of Qwen2-VL's width, 224 pixels
CUDA = Size(8, 32, 16, 80, torch.bfloat16, "auto", True)  # Qwen2-VL's tower, 448 pixels


NOTE = "One block, images of one size. Forward and backward; the mask, or the plan, is made anew."
IN_FLOAT32 = replace(CUDA, images=2, dtype=torch.float32)

SIZES = {"test": TEST, "cpu": CPU, "cuda": CUDA, CUDA_IN_FLOAT32: IN_FLOAT32}

BENCHMARK = Benchmark(
    id="B3",
    name="vision_attention",
    title="Attention of the vision tower, 8 images",
    peer_label="CoCoA's copy of the vision tower: heads as the batch of a 3-D SDPA call, a dense "
    "mask over all images",
    noun="images",
    target=4,
    note=NOTE,
    sizes=SIZES,
    build=VisionAttention,
    curves=(
        curve(
            "images in the batch",
            SECONDS,
            "images",
            {"test": (1, 2), "cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8)},
            SIZES,
        ),
    ),
)

WITH_BATCH_OF_ONE = replace(
    BENCHMARK,
    name="vision_attention_4d",
    title="The same attention against transformers 4.52",
    peer_label="transformers 4.52's VisionSdpaAttention: a 4-D SDPA call, a dense mask over all "
    "images",
    sizes={name: replace(size, fold_batch=False) for name, size in BENCHMARK.sizes.items()},
    curves=(),
)
