"""Qwen2-VL: how its stock model is fed a packed batch.

Adding a family is a file like this one, an entry in `models/loading.py` and a `conf/model/*.yaml`.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_pl.attention import VISION_ATTENTION, Plan, self_plan
from cocoa_pl.batch import Batch
from cocoa_pl.models.backbone import Backbone


class Qwen2VLBackbone(Backbone):
    """A stock `Qwen2VLForConditionalGeneration` whose attention follows a plan."""

    image_processor = Qwen2VLImageProcessorPil

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        # Set after construction: a name with "flash" in it at construction makes transformers look
        # for a kernel.
        self.stock.model.visual.config._attn_implementation = VISION_ATTENTION

    @property
    def merge_size(self) -> int:
        return int(self.stock.config.vision_config.spatial_merge_size)

    @property
    def hidden_size(self) -> int:
        return int(self.stock.config.text_config.hidden_size)

    def forward(self, batch: Batch, plan: Plan, pixels: Tensor | None = None) -> Tensor:
        model = self.stock.model
        states = model.get_input_embeddings()(batch.input_ids)  # (T, D)
        if len(batch.grids):
            visual = self._visual_tokens(self.pixels(batch) if pixels is None else pixels, batch)
            rows = batch.image_mask.nonzero()[:, 0]
            states = states.index_copy(0, rows, visual.to(states.dtype))
        output = model.language_model(
            inputs_embeds=states[None],
            position_ids=batch.position_ids[:, None],  # without them transformers falls back to 1-D
            plan=plan,
            kernel=self.kernel,
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def decoder_layer(self) -> nn.Module:
        text = self.stock.model.language_model
        layer: nn.Module = type(text.layers[0])(text.config, layer_idx=0)
        layer.apply(self.stock._init_weights)
        return layer

    def run_layer(self, layer: nn.Module, hidden: Tensor, batch: Batch, plan: Plan) -> Tensor:
        rotary = self.stock.model.language_model.rotary_emb
        output: Tensor = layer(
            hidden[None],
            position_embeddings=rotary(hidden[None], batch.position_ids[:, None]),
            plan=plan,
            kernel=self.kernel,
        )
        return output[0]

    def _visual_tokens(self, pixels: Tensor, batch: Batch) -> Tensor:
        """(P, B) -> (V, D)."""
        visual = self.stock.model.visual
        config = visual.config
        frames = pixels.view(len(pixels), config.in_channels, 1, -1)
        frames = frames.expand(-1, -1, config.temporal_patch_size, -1).flatten(
            1
        )  # a still image, repeated
        plan = self_plan(batch.grids.prod(1)).to(pixels.device)
        output = visual(
            frames.to(visual.dtype),
            grid_thw=batch.grids.to(pixels.device),
            plan=plan,
            kernel=self.kernel,
        )
        tokens: Tensor = output.pooler_output
        return tokens
