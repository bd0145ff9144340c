"""Qwen2-VL (arXiv 2409.12191): every block of the vision tower attends to whole images."""

from functools import partial

from cocoa_pl.models import vision_grids
from cocoa_pl.models.layout import VisionInputs
from cocoa_pl.models.qwen_vl import QwenVLBackbone


class Qwen2VLBackbone(QwenVLBackbone):
    """A stock `Qwen2VLForConditionalGeneration`."""

    @property
    def vision_inputs(self) -> VisionInputs:
        return partial(vision_grids.whole_images, merge_size=self.merge_size)
