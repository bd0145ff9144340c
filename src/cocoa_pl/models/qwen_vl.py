"""What the Qwen-VL families share: how a stock model of theirs is fed a packed batch.

Adding a family of this kind is a file like `qwen2_vl.py`, an entry in `models/loading.py`, an entry
in `models/tiny.py`, and a `conf/model/*.yaml`.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_pl.attention import VISION_ATTENTION
from cocoa_pl.batch import Batch
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.last_layer import read_rows_only
from cocoa_pl.models.layout import Layout


class QwenVLBackbone(Backbone):
    """A stock Qwen-VL model whose attention follows a plan.

    All families read pixels with the image processor of the first; its patch size and statistics
    differ and are read from the model's folder.
    """

    image_processor = Qwen2VLImageProcessorPil

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        # Set after construction: a name with "flash" in it at construction makes transformers look
        # for a kernel.
        self.stock.model.visual.config._attn_implementation = VISION_ATTENTION
        self.stock.model.visual.patch_embed.proj.__class__ = PatchProduct
        read_rows_only(self.stock.model.language_model.layers[-1])

    def text_inputs(self, vision: Any) -> dict[str, Any]:
        """What this family's language model takes from the tower beside the visual tokens.

        Args:
            vision: the stock tower's output.
        """
        return {}

    @property
    def merge_size(self) -> int:
        return int(self.stock.config.vision_config.spatial_merge_size)

    @property
    def hidden_size(self) -> int:
        return int(self.stock.config.text_config.hidden_size)

    @property
    def head_widths(self) -> tuple[int, int]:
        model = self.stock.model
        text, vision = model.language_model.layers[0].self_attn, model.visual.blocks[0].attn
        return int(text.head_dim), int(vision.head_dim)

    def forward(
        self,
        batch: Batch,
        layout: Layout,
        pixels: Tensor | None = None,
        *,
        reads: Tensor | None = None,
    ) -> Tensor:
        model = self.stock.model
        states = model.get_input_embeddings()(batch.input_ids)  # (T, D)
        more = {}
        if len(batch.grids):
            vision = self._see(self.pixels(batch) if pixels is None else pixels, batch, layout)
            visual = vision.pooler_output.to(states.dtype)
            states = states.index_copy(0, layout.visual_rows, visual)
            more = {"visual_rows": layout.visual_rows, **self.text_inputs(vision)}
        output = model.language_model(
            inputs_embeds=states[None],
            position_ids=batch.position_ids[:, None],  # without them transformers falls back to 1-D
            plan=layout.plan,
            kernel=self.kernel,
            use_cache=False,
            reads=reads,
            **more,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def decoder_layer(self) -> nn.Module:
        text = self.stock.model.language_model
        kind = type(text.layers[0])
        layer: nn.Module = kind(text.config, layer_idx=0)
        layer.apply(self.stock._init_weights)
        read_rows_only(layer)
        return layer

    def run_layer(
        self, layer: nn.Module, hidden: Tensor, batch: Batch, layout: Layout, reads: Tensor
    ) -> Tensor:
        rotary = self.stock.model.language_model.rotary_emb
        output: Tensor = layer(
            hidden[None],
            position_embeddings=rotary(hidden[None], batch.position_ids[:, None]),
            plan=layout.plan,
            kernel=self.kernel,
            reads=reads,
        )
        return output[0]

    def _see(self, pixels: Tensor, batch: Batch, layout: Layout) -> Any:
        """(P, B) float -> the stock tower's output; its `pooler_output` is (V, D)."""
        visual = self.stock.model.visual
        config = visual.config
        frames = pixels.view(len(pixels), config.in_channels, 1, -1)
        # A still image is one frame, repeated.
        frames = frames.expand(-1, -1, config.temporal_patch_size, -1).flatten(1)
        return visual(
            frames.to(visual.dtype),
            grid_thw=batch.grids,  # everything that the tower would work out of them is given
            kernel=self.kernel,
            **layout.vision,
        )


class PatchProduct(nn.Conv3d):
    """A stock patch embedding, whose kernel is as large as a patch, as the matrix product it is.

    cuDNN's convolution computes in TF32 where float32 was asked for, and in bfloat16 it takes up to
    seconds a call in some of its versions (https://github.com/pytorch/pytorch/issues/174051).
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, frames, height, width) -> (P, D, 1, 1, 1)."""
        states = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return states[:, :, None, None, None]
