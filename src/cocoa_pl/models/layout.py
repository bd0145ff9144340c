"""A packed batch and a policy in; what a forward pass would otherwise have to ask the device out.

Everything here is worked out on the host, in a data worker, from numbers that never were on the
device. So a step only enqueues work and never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cocoa_pl.attention import Plan, Policy, make_plan
from cocoa_pl.attention.plan import on_device
from cocoa_pl.batch import Batch

# Grids (I, 3) of at least one image -> keywords of the family's vision tower: tensors and plans on
# the CPU, and numbers.
VisionInputs = Callable[[Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Layout:
    """Where everything of one batch lies, and who attends to whom.

    Attributes:
        plan: of the language model.
        vision: keywords of the vision tower, among them its own plan; empty without images.
        visual_rows: (V) int64, the tokens that the vision tower's output replaces.
        eos_rows: (S) int64, the EOS of every sample that is no filler.
    """

    plan: Plan
    vision: Mapping[str, Any]
    visual_rows: Tensor
    eos_rows: Tensor

    def to(self, device: torch.device) -> Layout:
        return Layout(
            self.plan.to(device),
            {name: _moved(value, device) for name, value in self.vision.items()},
            on_device(self.visual_rows, device),
            on_device(self.eos_rows, device),
        )

    def pin_memory(self) -> Layout:
        return Layout(
            self.plan.pin_memory(),
            {n: v if isinstance(v, int) else v.pin_memory() for n, v in self.vision.items()},
            self.visual_rows.pin_memory(),
            self.eos_rows.pin_memory(),
        )


@dataclass(frozen=True)
class Kernels:
    """Who will compute the attention of a batch, and on what kind of device: what is built ahead
    for them depends on both.
    """

    text: str
    vision: str
    device: torch.device


@dataclass(frozen=True)
class Layouts:
    """Lays batches out for one model under one policy; small, and pickled into the workers.

    Args:
        vision_inputs: what the family's vision tower asks for.
    """

    policy: Policy
    kernels: Kernels
    vision_inputs: VisionInputs

    def __call__(self, batch: Batch) -> Layout:
        device, real = self.kernels.device, batch.num_samples - batch.num_fillers
        plan = make_plan(self.policy, batch.segment_lengths)
        vision: dict[str, Any] = {}
        if len(batch.grids):
            vision = dict(self.vision_inputs(batch.grids))
            vision["plan"] = vision["plan"].to(device).prepared(self.kernels.vision)
        return Layout(
            plan=plan.to(device).prepared(self.kernels.text),
            vision=vision,
            visual_rows=batch.image_mask.nonzero()[:, 0],
            eos_rows=batch.eos_positions[:real],
        )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return on_device(value, device)
    return value if isinstance(value, int) else value.to(device)
