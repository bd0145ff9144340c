"""What the Qwen-VL families share: how a stock model of theirs is fed a packed batch.

Adding a family of this kind is a file like `qwen2_vl.py`, an entry in `models/loading.py`, an entry
in `models/tiny.py`, and a `conf/model/*.yaml`.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cocoa_pl.attention import VISION_ATTENTION, Plan
from cocoa_pl.batch import Batch
from cocoa_pl.models import vision_grids
from cocoa_pl.models.backbone import Backbone


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

    @abstractmethod
    def vision_inputs(self, grids: Tensor) -> dict[str, Any]:
        """What this family's tower asks for beside the patches and their positions.

        Args:
            grids: (I, 3) int64 on the CPU, at least one image.

        Returns:
            Keywords of the stock tower; among them `plan`. Tensors and plans are on the CPU.
        """

    def text_inputs(self, vision: Any, batch: Batch) -> dict[str, Any]:
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

    def forward(self, batch: Batch, plan: Plan, pixels: Tensor | None = None) -> Tensor:
        model = self.stock.model
        states = model.get_input_embeddings()(batch.input_ids)  # (T, D)
        more = {}
        if len(batch.grids):
            vision = self._see(self.pixels(batch) if pixels is None else pixels, batch.grids)
            rows = batch.image_mask.nonzero()[:, 0]
            states = states.index_copy(0, rows, vision.pooler_output.to(states.dtype))
            more = self.text_inputs(vision, batch)
        output = model.language_model(
            inputs_embeds=states[None],
            position_ids=batch.position_ids[:, None],  # without them transformers falls back to 1-D
            plan=plan,
            kernel=self.kernel,
            use_cache=False,
            **more,
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

    def _see(self, pixels: Tensor, grids: Tensor) -> Any:
        """(P, B) float -> the stock tower's output; its `pooler_output` is (V, D)."""
        visual = self.stock.model.visual
        config = visual.config
        frames = pixels.view(len(pixels), config.in_channels, 1, -1)
        # A still image is one frame, repeated.
        frames = frames.expand(-1, -1, config.temporal_patch_size, -1).flatten(1)
        patches = grids.prod(1)  # of each image
        inputs = {
            "position_ids": vision_grids.positions(grids, merge_size=self.merge_size),
            "cu_seqlens": nn.functional.pad(patches.cumsum(0), (1, 0)).int(),
            **self.vision_inputs(grids),
        }
        return visual(
            frames.to(visual.dtype),
            grid_thw=grids,  # everything that the tower would work out of them is given
            max_seqlen=int(patches.max()),
            kernel=self.kernel,
            **{name: _moved(value, pixels.device) for name, value in inputs.items()},
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value if isinstance(value, int) else value.to(device)
