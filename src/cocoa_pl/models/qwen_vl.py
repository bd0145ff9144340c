"""The Qwen-VL families: how a stock transformers model of theirs is fed a packed batch.

Qwen2-VL (arXiv 2409.12191): every block of the vision tower attends to whole images.
Qwen2.5-VL (arXiv 2502.13923): most blocks attend to windows.
Qwen3-VL (arXiv 2511.21631): learnt position embeddings in the vision tower, whose earlier blocks
also reach the first layers of the language model (DeepStack, arXiv 2406.04334).

A further family of this kind is a subclass here, an entry in `FAMILIES` and a conf/model/*.yaml.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from cocoa_pl.attention import VISION_ATTENTION, self_plan
from cocoa_pl.data.batch import Batch
from cocoa_pl.models.backbone import Backbone, VisionInputs


class QwenVLBackbone(Backbone):
    """A stock Qwen-VL model whose attention follows a plan.

    All families read pixels with the image processor of the first; its patch size and statistics
    differ and are read from the model's folder.
    """

    image_processor = Qwen2VLImageProcessorPil

    def __init__(self, model: nn.Module, image_processor: Any, *, kernel: str) -> None:
        super().__init__(model, image_processor, kernel=kernel)
        # Set after construction: a name with "flash" in it at construction makes transformers look
        # for a kernel.
        self.stock.model.visual.config._attn_implementation = VISION_ATTENTION
        self.stock.model.visual.patch_embed.proj.__class__ = PatchProduct

    def text_inputs(self, vision: Any) -> dict[str, Any]:
        """Keywords of this family's language model beside the visual tokens.

        Args:
            vision: the stock tower's output.
        """
        return {}

    @property
    def head_widths(self) -> tuple[int, int]:
        model = self.stock.model
        text, vision = model.language_model.layers[0].self_attn, model.visual.blocks[0].attn
        return int(text.head_dim), int(vision.head_dim)

    def forward(self, batch: Batch, pixels: Tensor | None = None) -> Tensor:
        model = self.stock.model
        states = model.get_input_embeddings()(batch.input_ids)  # (T, D)
        inputs = {}
        if len(batch.grids):
            vision = self._see(self.pixels(batch) if pixels is None else pixels, batch)
            # Of a text-only batch beside other ranks' images nothing is written, see
            # `StageModule.aligned`: its image is a dummy that no token reads.
            visual = vision.pooler_output[: len(batch.visual_rows)].to(states.dtype)
            states = states.index_copy(0, batch.visual_rows, visual)
            inputs = {"visual_rows": batch.visual_rows, **self.text_inputs(vision)}
        output = model.language_model(
            inputs_embeds=states[None],
            position_ids=batch.position_ids[:, None],  # without them transformers falls back to 1-D
            plan=batch.plan,
            kernel=self.kernel,
            use_cache=False,
            **inputs,
        )
        # `output_hidden_states`, as the released code sets it, keeps those of every layer.
        return output.last_hidden_state[0]

    def decoder_layer(self) -> nn.Module:
        text = self.stock.model.language_model
        layer = type(text.layers[0])(text.config, layer_idx=0)
        return layer.apply(self.stock._init_weights)

    def run_layer(self, layer: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        rotary = self.stock.model.language_model.rotary_emb
        output = layer(
            hidden[None],
            position_embeddings=rotary(hidden[None], batch.position_ids[:, None]),
            plan=batch.plan,
            kernel=self.kernel,
        )
        return output[0]

    def _see(self, pixels: Tensor, batch: Batch) -> Any:
        """(P, B) float -> the stock tower's output; its `pooler_output` is (V, D)."""
        visual = self.stock.model.visual
        config = visual.config
        frames = pixels.view(len(pixels), config.in_channels, 1, -1)
        # A still image is one frame, repeated.
        frames = frames.expand(-1, -1, config.temporal_patch_size, -1).flatten(1)
        return visual(
            frames.to(visual.dtype), grid_thw=batch.grids, kernel=self.kernel, **batch.vision
        )


class Qwen2VLBackbone(QwenVLBackbone):
    """A stock `Qwen2VLForConditionalGeneration`."""

    @property
    def vision_inputs(self) -> VisionInputs:
        return partial(whole_images, merge_size=self.merge_size)


class Qwen25VLBackbone(QwenVLBackbone):
    """A stock `Qwen2_5_VLForConditionalGeneration`."""

    def __init__(self, model: nn.Module, image_processor: Any, *, kernel: str) -> None:
        super().__init__(model, image_processor, kernel=kernel)
        visual = self.stock.model.visual
        for rank, block in enumerate(visual.blocks):
            if rank not in visual.fullatt_block_indexes:
                # The stock tower hands the same keywords to all blocks. Hooks run outside
                # activation checkpointing and stay when peft or FSDP wrap what is inside the block.
                block.register_forward_pre_hook(_see_windows, with_kwargs=True)

    @property
    def vision_inputs(self) -> VisionInputs:
        config = self.stock.config.vision_config
        return partial(
            windowed_images,
            merge_size=self.merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )


class Qwen3VLBackbone(QwenVLBackbone):
    """A stock `Qwen3VLForConditionalGeneration`.

    The stock model adds DeepStack's features by a boolean mask, which waits for the device once a
    layer; here hooks add them at rows that the host knows.
    """

    def __init__(self, model: nn.Module, image_processor: Any, *, kernel: str) -> None:
        super().__init__(model, image_processor, kernel=kernel)
        stock = self.stock.model
        count = len(stock.visual.deepstack_visual_indexes)
        for rank, layer in enumerate(stock.language_model.layers[:count]):
            layer.register_forward_hook(partial(_add_features, rank), with_kwargs=True)

    @property
    def vision_inputs(self) -> VisionInputs:
        side = self.stock.model.visual.num_grid_per_side
        return partial(interpolated_images, merge_size=self.merge_size, side=side)

    def text_inputs(self, vision: Any) -> dict[str, Any]:
        return {"visual_features": vision.deepstack_features}


class PatchProduct(nn.Conv3d):
    """A stock patch embedding, whose kernel is as large as a patch, as the matrix product it is.

    cuDNN's convolution computes in TF32 where float32 was asked for, and in bfloat16 it takes up to
    seconds a call in some of its versions (https://github.com/pytorch/pytorch/issues/174051).
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, frames, height, width) -> (P, D, 1, 1, 1)."""
        states = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return states[:, :, None, None, None]


def _see_windows(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: the block follows the plan of windows."""
    return args, {**kwargs, "plan": kwargs["window_plan"]}


def _add_features(
    rank: int, layer: nn.Module, args: Any, inputs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """A forward hook: a layer's visual tokens plus the features of a block of the vision tower."""
    if "visual_features" not in inputs:
        return None
    rows = inputs["visual_rows"]
    features = inputs["visual_features"][rank][: len(rows)]
    return output.index_add(1, rows, features.to(output.dtype)[None])


# What follows computes the keywords of vision towers on the host, in the data workers: the stock
# towers work them out themselves when they are not given, and wait for the device on the way. It
# takes 0.1 to 0.4 ms of an image of 600 patches, whose decoding takes ten times that.


def whole_images(grids: Tensor, *, merge_size: int) -> dict[str, Any]:
    """Keywords of a stock tower whose blocks see whole images.

    Args:
        grids: (I, 3) int64 of at least one image, on the CPU.
    """
    plan = self_plan(grids.prod(1))
    return {
        "position_ids": get_vision_position_ids(grids, merge_size),  # (P, 2)
        "cu_seqlens": plan.cu_seqlens_q,
        "max_seqlen": plan.max_q,
        "plan": plan,
    }


def windowed_images(
    grids: Tensor, *, merge_size: int, window_size: int, patch_size: int
) -> dict[str, Any]:
    """Keywords of a tower some of whose blocks see windows of `window_size` pixels a side.

    Windows at the right and lower edges are smaller; none holds parts of two images. Both plans
    speak of patches in the order of windows, in which an image's patches stay together.
    """
    index, bounds = get_vision_window_index(grids, merge_size, window_size, patch_size)
    plan = self_plan(bounds.diff().long())
    return {
        **whole_images(grids, merge_size=merge_size),
        "window_plan": plan,
        "window_index": index,  # (V)
        "cu_window_seqlens": plan.cu_seqlens_q,
        "max_window_seqlen": plan.max_q,
    }


def interpolated_images(grids: Tensor, *, merge_size: int, side: int) -> dict[str, Any]:
    """Keywords of a tower with a `side` x `side` table of learnt position embeddings, of which each
    patch reads four rows, bilinear with aligned corners.
    """
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids, side, mode="bilinear", align_corners=True, spatial_merge_size=merge_size
    )
    return {
        **whole_images(grids, merge_size=merge_size),
        "interp_indices": indices,  # (P, 4) int64
        "interp_weights": weights,  # (P, 4) float32
    }
