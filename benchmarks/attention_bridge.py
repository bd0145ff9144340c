"""B2. EOS-bridged attention and its gradients: segments of a packed row, against a dense mask over
padded rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.benchmark import CUDA_IN_FLOAT32, SECONDS, Benchmark, Task, curve
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, torch_counts
from benchmarks.machine import ROOT
from benchmarks.peers.attention import additive_mask, dense_attention
from cocoa_pl.attention import Plan, Policy, attend, make_plan
from cocoa_pl.attention.kernels import chosen


@dataclass(frozen=True)
class Size:
    """Lengths are log-normal, as captions and images of mixed sizes are.

    Attributes:
        context, target: median tokens of the two segments.
        spread: standard deviation of the logarithm of a length.
        layers: calls that share a mask, or a plan.
    """

    samples: int
    context: int
    target: int
    spread: float
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    dtype: torch.dtype
    kernel: str


class BridgedAttention(Task):
    """Mask or plan from segment lengths, then forward and backward of some layers."""

    def __init__(self, size: Size, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.device, self.samples = size, device, size.samples
        self.policy = policy("eos_bridge")
        self.segment_lengths = segment_lengths(size, generator)
        self.scale = size.head_dim**-0.5
        lengths = self.segment_lengths.sum(1)
        self.slots = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, N) real ones

        def normal(heads: int) -> Tensor:
            rows = torch.randn(int(lengths.sum()), heads, size.head_dim, generator=generator)
            return rows.to(device, size.dtype)

        heads = (size.heads, size.kv_heads, size.kv_heads)
        self.packed = [normal(count).requires_grad_() for count in heads]
        self.gradient = normal(size.heads)
        self.padded = [self._padded(states.detach()).requires_grad_() for states in self.packed]
        self.padded_gradient = self._padded(self.gradient)

    def _padded(self, rows: Tensor) -> Tensor:
        """(T, H, D) -> (B, H, N, D), with zeros behind each sample."""
        padded = rows.new_zeros(*self.slots.shape, *rows.shape[1:])
        padded[self.slots.to(self.device)] = rows
        return padded.transpose(1, 2).contiguous()

    def _unpadded(self, padded: Tensor) -> Tensor:
        return padded.transpose(1, 2)[self.slots.to(self.device)]

    def plan(self) -> Plan:
        """Made anew in every step: each has other lengths."""
        kernel = kernel_of(self.size, self.device)
        return make_plan(self.policy, self.segment_lengths).prepared(kernel).to(self.device)

    def peer(self) -> list[Tensor]:
        mask = additive_mask(
            self.policy.table,
            self.segment_lengths,
            slots=self.slots.shape[1],
            device=self.device,
            dtype=self.size.dtype,
        )
        for _ in range(self.size.layers):
            output = dense_attention(*self.padded, mask=mask, scale=self.scale)
            gradients = torch.autograd.grad(output, self.padded, self.padded_gradient)
        return [output.detach(), *gradients]

    def ours(self) -> list[Tensor]:
        plan = self.plan()
        query, key, value = self.packed
        for _ in range(self.size.layers):
            output = attend(query, key, value, plan, kernel=self.size.kernel, scale=self.scale)
            gradients = torch.autograd.grad(output, self.packed, self.gradient)
        return [output.detach(), *gradients]

    def check(self) -> None:
        assert_close(self.ours(), [self._unpadded(one) for one in self.peer()])

    def counts(self) -> Counts:
        rows, longest = self.slots.shape
        peer, plan = rows * longest**2, self.plan()
        ours = computed_scores(plan)
        return {
            "scores": Count(peer, ours),
            "scores_over_needed": Count(peer / plan.num_scores, ours / plan.num_scores),
            "token_slots_per_real_token": Count(rows * longest / int(self.slots.sum()), 1.0),
            **torch_counts(self.peer, self.ours, device=self.device),
        }


def policy(name: str) -> Policy:
    """An attention policy as its YAML file says."""
    path: Path = ROOT / "conf" / "attention" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text())
    return Policy(**{key: value for key, value in values.items() if key != "_target_"})


def segment_lengths(size: Size, generator: torch.Generator) -> Tensor:
    """(S, 3) int64: CONTEXT, BOTTLENECK, TARGET."""
    spread = torch.exp(size.spread * torch.randn(size.samples, 2, generator=generator))
    lengths = (spread * torch.tensor([size.context, size.target])).round().long().clamp(min=1)
    return torch.stack([lengths[:, 0], torch.ones_like(lengths[:, 0]), lengths[:, 1]], dim=1)


def kernel_of(size: Any, device: torch.device) -> str:
    """The kernel that computes at this size."""
    return chosen(size.kernel, device=device, dtype=size.dtype, head_width=size.head_dim)


def computed_scores(plan: Plan) -> int:
    """Pairs of query and key that are really computed: `sdpa` pads within its rectangles."""
    padded = plan.padded
    return plan.num_scores if padded is None else sum(r.scores for r in padded.rectangles)


TEST = Size(6, 40, 12, 0.6, 4, 2, 8, 1, torch.float32, "sdpa")
CPU = Size(8, 300, 40, 0.6, 4, 2, 64, 2, torch.float32, "sdpa")
CUDA = Size(24, 300, 40, 0.6, 12, 2, 128, 4, torch.bfloat16, "auto")
IN_FLOAT32 = replace(CUDA, samples=4, dtype=torch.float32)

SIZES = {"test": TEST, "cpu": CPU, "cuda": CUDA, CUDA_IN_FLOAT32: IN_FLOAT32}

BENCHMARK = Benchmark(
    id="B2",
    name="attention_bridge",
    title="EOS-bridged attention on skewed lengths",
    peer_label="CoCoA's modeling_qwen2_vl.py in its second stage: padded rows, a dense 4-D mask, "
    "repeated key-value heads, SDPA",
    noun="samples",
    target=1.5,
    note="Log-normal lengths, medians 300 (CONTEXT) and 40 (TARGET). The mask, or the plan, is "
    "made in every run. Forward and backward.",
    sizes=SIZES,
    build=BridgedAttention,
    curves=(
        curve(
            "median context, tokens",
            SECONDS,
            "context",
            {"test": (10, 20), "cpu": (40, 75, 150, 300), "cuda": (150, 300, 600, 1200)},
            SIZES,
        ),
    ),
)
