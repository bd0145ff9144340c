"""The stock transformers model, wrapped and never forked: packed batches become hidden states,
unit embeddings, or pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cocoa_pl.attention import Plan, Policy, make_plan
from cocoa_pl.attention.kernels import chosen
from cocoa_pl.data.batch import Batch, PlanBatch
from cocoa_pl.errors import UserError

# Grids (I, 3) of at least one image -> keywords of the family's vision tower: tensors and plans on
# the CPU, and numbers.
VisionInputs = Callable[[Tensor], Mapping[str, Any]]


class NoVocabularyHead(nn.Module):
    """In the place of an untied vocabulary head that the files lack, as those of models that others
    trained to embed and no more; to embed needs none, and one at random is nothing to export.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        raise UserError("the model's files hold no vocabulary head (lm_head.weight)")


class Backbone(nn.Module, ABC):
    """What every family shares; a family says how its stock model is fed (see `qwen_vl.py`).

    Args:
        model: a stock generative vision-language model, possibly with peft adapters inside.
        image_processor: the model's own, which says how bytes become floats.
        kernel: attention kernel, a name in `attention.kernels.KERNELS`.
    """

    # The family's image processor on PIL; in older transformers 5 the automatic choice asks for
    # torchvision.
    image_processor: ClassVar[Any]

    byte_values: Tensor

    def __init__(self, model: nn.Module, image_processor: Any, *, kernel: str) -> None:
        super().__init__()
        self.model = model
        self.kernel = kernel
        # Of matrix products; what trains is kept in float32 all the same (see `adapters.py`).
        self.compute_dtype: torch.dtype = self.stock.dtype
        self.merge_size: int = image_processor.merge_size  # patches of a visual token's side
        # A byte has 256 values: the image processor's own arithmetic, done once for all pixels to
        # come.
        scaled = (torch.arange(256).double() * image_processor.rescale_factor).float()
        mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std])[..., None]
        self.register_buffer("byte_values", (scaled - mean) / std, persistent=False)  # (C, 256)

    @property
    def stock(self) -> Any:
        """The transformers model itself, with or without adapters around it."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    def hidden_size(self) -> int:
        return int(self.stock.config.get_text_config().hidden_size)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the language model and of the vision tower."""
        return [*self.stock.model.language_model.layers, *self.stock.model.visual.blocks]

    @property
    def device(self) -> torch.device:
        return self.byte_values.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return super().__call__(*args, **kwargs)

    def autocast(self) -> torch.autocast:
        """Matrix products in the model's own type, in training as in evaluation.

        Without autocast's cache of weights: what the first pass of a gradient cache leaves there
        has no gradient.
        """
        return torch.autocast(
            self.device.type,
            dtype=self.compute_dtype,
            enabled=self.compute_dtype != torch.float32,
            cache_enabled=False,
        )

    @property
    @abstractmethod
    def vision_inputs(self) -> VisionInputs:
        """What the vision tower asks for beside pixels: a picklable function of the image grids."""

    @property
    @abstractmethod
    def head_widths(self) -> tuple[int, int]:
        """Of the language model's attention heads, and of the vision tower's."""

    def planner(self, policy: Policy, device: torch.device | None = None) -> PlanBatch:
        """What plans the attention of batches, in the data workers; small and picklable.

        Args:
            device: where the model will be when it sees them; None if it is there already.
        """
        device = self.device if device is None else device
        text, vision = (
            chosen(self.kernel, device=device, dtype=self.compute_dtype, head_width=width)
            for width in self.head_widths
        )
        kernels, vision_inputs = (text, vision), self.vision_inputs
        return partial(plan_batch, policy=policy, kernels=kernels, vision_inputs=vision_inputs)

    @abstractmethod
    def forward(self, batch: Batch, pixels: Tensor | None = None) -> Tensor:
        """Last hidden states (T, D) of a batch that is on the model's device.

        Args:
            pixels: (P, B) float, normalised, when they are not simply the batch's own (masking).
        """

    @abstractmethod
    def decoder_layer(self) -> nn.Module:
        """A new layer of the language model's own kind, for the image decoder."""

    @abstractmethod
    def run_layer(self, layer: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """Feed packed states through such a layer: (T, D) -> (T, D)."""

    def pixels(self, batch: Batch) -> Tensor:
        """The batch's bytes as normalised floats (P, B), bit-equal to the image processor's."""
        channels, levels = self.byte_values.shape
        first = torch.arange(channels, device=self.device, dtype=torch.int32)[:, None] * levels
        places = batch.patches.unflatten(1, (channels, -1)).int() + first  # (P, C, values)
        return self.byte_values.flatten().index_select(0, places.flatten()).view_as(batch.patches)

    def vocabulary(self, hidden: Tensor) -> Tensor:
        """Logits of chosen states: (M, D) -> (M, V)."""
        with self.autocast():
            return self.stock.get_output_embeddings()(hidden)

    def embed(self, batch: Batch) -> Tensor:
        """The L2-normalised last hidden state at each sample's BOTTLENECK (the mean of the states
        where it has several tokens): (S, D) float32.
        """
        hidden = self(batch)
        states = hidden.index_select(0, batch.bottleneck_rows.flatten()).float()
        states = states.view(*batch.bottleneck_rows.shape, hidden.shape[1]).mean(1)  # (S, k, D)
        return normalize(states, dim=-1)


class ImageDecoder(nn.Module):
    """The warm-up stage's: one decoder layer of the backbone's own kind and a linear projection (as
    in MoCa, arXiv 2506.23115).

    It predicts one frame for each hidden visual token: the temporal copy of a still image is
    redundant.

    Args:
        backbone: lends the kind of layer, not its weights; not registered as a submodule.
        patch_values: values of one patch of one frame (channels x side x side).
    """

    def __init__(self, backbone: Backbone, *, patch_values: int) -> None:
        super().__init__()
        self.layer = backbone.decoder_layer()
        self.projection = nn.Linear(backbone.hidden_size, patch_values * backbone.merge_size**2)

    def forward(self, backbone: Backbone, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states (T, D) to the normalised pixels (N, merge_size ** 2 * B) of the batch's
        hidden visual tokens.
        """
        with backbone.autocast():
            states = backbone.run_layer(self.layer, hidden, batch)
            return self.projection(states.index_select(0, batch.patch_rows))


def plan_batch(
    segment_lengths: Tensor,
    grids: Tensor,
    *,
    policy: Policy,
    kernels: tuple[str, str],
    vision_inputs: VisionInputs,
) -> tuple[Plan, Mapping[str, Any]]:
    """Work out on the host what a forward pass would otherwise have to ask the device.

    In a data worker, from numbers that never were on the device, so that a step only enqueues work
    and never waits.

    Args:
        segment_lengths: (S, 3) int64, CPU.
        grids: (I, 3) int64, CPU.
        kernels: of the language model and of the vision tower.

    Returns:
        The plan of the language model, and the keywords of the vision tower, among them its own
        plans; empty without images.
    """
    text, vision = kernels
    found = vision_inputs(grids) if len(grids) else {}
    return make_plan(policy, segment_lengths).prepared(text), {
        name: value.prepared(vision) if isinstance(value, Plan) else value
        for name, value in found.items()
    }
