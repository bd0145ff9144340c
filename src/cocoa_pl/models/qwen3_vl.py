"""Qwen3-VL (arXiv 2511.21631): learnt position embeddings in the vision tower, whose earlier blocks
also reach the first layers of the language model (DeepStack, arXiv 2406.04334).
"""

from typing import Any

from torch import Tensor

from cocoa_pl.attention import self_plan
from cocoa_pl.batch import Batch
from cocoa_pl.models import vision_grids
from cocoa_pl.models.qwen_vl import QwenVLBackbone


class Qwen3VLBackbone(QwenVLBackbone):
    """A stock `Qwen3VLForConditionalGeneration`."""

    def vision_inputs(self, grids: Tensor) -> dict[str, Any]:
        visual = self.stock.model.visual
        index, weights = vision_grids.interpolation(
            grids, merge_size=self.merge_size, side=visual.num_grid_per_side
        )
        return {
            "plan": self_plan(grids.prod(1)),
            "interp_indices": index,
            "interp_weights": weights,
        }

    def text_inputs(self, vision: Any, batch: Batch) -> dict[str, Any]:
        return {
            "visual_pos_masks": batch.image_mask[None],
            "deepstack_visual_embeds": vision.deepstack_features,
        }
