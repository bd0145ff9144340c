"""Qwen2.5-VL (arXiv 2502.13923): most blocks of the vision tower attend within windows.

The tower reorders the patches so that each window lies in one piece, and undoes it behind the last
block. Both plans speak of that order; which one a block follows is decided when the model is
wrapped.
"""

from functools import partial
from typing import Any

from torch import nn

from cocoa_pl.models import vision_grids
from cocoa_pl.models.layout import VisionInputs
from cocoa_pl.models.qwen_vl import QwenVLBackbone


class Qwen25VLBackbone(QwenVLBackbone):
    """A stock `Qwen2_5_VLForConditionalGeneration`."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        visual = self.stock.model.visual
        for rank, block in enumerate(visual.blocks):
            kind = "images" if rank in visual.fullatt_block_indexes else "windows"
            # The stock tower hands the same keywords to all blocks. Hooks run outside activation
            # checkpointing and stay when peft or FSDP wrap what is inside the block.
            block.register_forward_pre_hook(partial(_choose_plan, kind), with_kwargs=True)

    @property
    def vision_inputs(self) -> VisionInputs:
        config = self.stock.config.vision_config
        return partial(
            vision_grids.windowed_images,
            merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )


def _choose_plan(
    kind: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the block's own plan out of `WindowPlans`."""
    return args, {**kwargs, "plan": getattr(kwargs["plan"], kind)}
