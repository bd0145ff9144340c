"""Qwen2-VL (arXiv 2409.12191): every block of the vision tower attends to whole images."""

from typing import Any

from torch import Tensor

from cocoa_pl.attention import self_plan
from cocoa_pl.models.qwen_vl import QwenVLBackbone


class Qwen2VLBackbone(QwenVLBackbone):
    """A stock `Qwen2VLForConditionalGeneration`."""

    def vision_inputs(self, grids: Tensor) -> dict[str, Any]:
        return {"plan": self_plan(grids.prod(1))}
