"""Qwen3-VL (arXiv 2511.21631): learnt position embeddings in the vision tower, whose earlier blocks
also reach the first layers of the language model (DeepStack, arXiv 2406.04334).

The stock model adds these by a boolean mask, which waits for the device once a layer; here hooks
add them at rows that the host knows.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cocoa_pl.models import vision_grids
from cocoa_pl.models.last_layer import ReadsRows
from cocoa_pl.models.layout import VisionInputs
from cocoa_pl.models.qwen_vl import QwenVLBackbone


class Qwen3VLBackbone(QwenVLBackbone):
    """A stock `Qwen3VLForConditionalGeneration`."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        stock = self.stock.model
        count = len(stock.visual.deepstack_visual_indexes)
        for rank, layer in enumerate(stock.language_model.layers[:count]):
            layer.register_forward_hook(partial(_add_features, rank), with_kwargs=True)

    @property
    def vision_inputs(self) -> VisionInputs:
        return partial(
            vision_grids.interpolated_images,
            merge_size=self.merge_size,
            side=self.stock.model.visual.num_grid_per_side,
        )

    def text_inputs(self, vision: Any) -> dict[str, Any]:
        return {"visual_features": vision.deepstack_features}


def _add_features(
    rank: int,
    layer: nn.Module,
    states: tuple[Tensor, ...],
    inputs: dict[str, Any],
    output: Tensor,
) -> Tensor | None:
    """A forward hook: what a block of the vision tower says, on top of a layer's visual tokens."""
    if "visual_features" not in inputs:
        return None
    features = inputs["visual_features"][rank].to(output.dtype)[None]
    if not isinstance(layer, ReadsRows) or inputs["reads"] is None:
        return output.index_add(1, inputs["visual_rows"], features)
    # As many blocks reach up as there are layers, and of the last one some rows are read.
    every = torch.zeros_like(states[0], dtype=output.dtype)
    every = every.index_add(1, inputs["visual_rows"], features)
    return output + every.index_select(1, inputs["reads"])
