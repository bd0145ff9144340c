"""A packed batch in, hidden states or unit embeddings out. The stock transformers model, wrapped
and never forked.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cocoa_pl.attention import Policy
from cocoa_pl.attention.kernels import KERNELS, chosen
from cocoa_pl.batch import Batch
from cocoa_pl.models.layout import Kernels, Layout, Layouts, VisionInputs

log = logging.getLogger(__name__)


class Backbone(nn.Module, ABC):
    """What every family shares; a family says how its stock model is fed (see `qwen2_vl.py`).

    Args:
        model: a stock generative vision-language model, possibly with peft adapters inside.
        kernel: attention kernel, a name in `attention.kernels.KERNELS`.
        image_mean, image_std: pixel statistics of the model's image processor.
        rescale_factor: what its image processor multiplies uint8 pixels by.
    """

    # The family's image processor on PIL; in older transformers 5 the automatic choice asks for
    # torchvision.
    image_processor: ClassVar[Any]

    byte_values: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        kernel: str,
        image_mean: list[float],
        image_std: list[float],
        rescale_factor: float,
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"unknown attention kernel {kernel!r}; there are {sorted(KERNELS)}")
        log.info("attention kernel: %s", kernel)
        self.model = model
        self.kernel = kernel
        # Of matrix products; what trains is kept in float32 all the same (see `adapters.py`).
        self.compute_dtype: torch.dtype = self.stock.dtype
        # A byte has 256 values: the image processor's own arithmetic, done once for all pixels to
        # come.
        scaled = (torch.arange(256).double() * rescale_factor).float()
        mean, std = torch.tensor(image_mean)[:, None], torch.tensor(image_std)[:, None]
        self.register_buffer("byte_values", (scaled - mean) / std, persistent=False)  # (C, 256)

    @property
    def stock(self) -> Any:
        """The transformers model itself, with or without adapters around it."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    @abstractmethod
    def merge_size(self) -> int:
        """A visual token is merge_size x merge_size patches."""

    @property
    @abstractmethod
    def hidden_size(self) -> int: ...

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of the language model and of the vision tower."""
        return [*self.stock.model.language_model.layers, *self.stock.model.visual.blocks]

    @property
    def num_token_rows(self) -> int:
        """Rows of the token embedding, reserved ones included."""
        return int(self.stock.get_input_embeddings().weight.shape[0])

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

    def layouts(self, policy: Policy, device: torch.device | None = None) -> Layouts:
        """What lays batches out for this model, in the workers.

        Args:
            device: where the model will be when it sees them; None if it is there already.
        """
        device = self.device if device is None else device
        text, vision = (
            chosen(self.kernel, device=device, dtype=self.compute_dtype, head_width=width)
            for width in self.head_widths
        )
        return Layouts(policy, Kernels(text, vision, device), self.vision_inputs)

    @abstractmethod
    def forward(
        self,
        batch: Batch,
        layout: Layout,
        pixels: Tensor | None = None,
        *,
        reads: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states; batch and layout are on the model's device.

        Args:
            layout: of this batch; says who attends to whom. There is no default.
            pixels: (P, B) float, normalised, when they are not simply the batch's own (corruption).
            reads: (R) int64, the rows whose states are wanted; None for all.

        Returns:
            (R, D), or (T, D).
        """

    @abstractmethod
    def decoder_layer(self) -> nn.Module:
        """A new layer of the language model's own kind, for the image decoder."""

    @abstractmethod
    def run_layer(
        self, layer: nn.Module, hidden: Tensor, batch: Batch, layout: Layout, reads: Tensor
    ) -> Tensor:
        """Feed packed states (T, D) through such a layer and read some rows: (R, D)."""

    def pixels(self, batch: Batch) -> Tensor:
        """uint8 patches to normalised floats on the device, bit-equal to the image processor: (P,
        B).
        """
        channels, levels = self.byte_values.shape
        count, size = batch.patches.shape
        flat = batch.patches.view(count, channels, size // channels).int()
        row = torch.arange(channels, device=self.device, dtype=torch.int32)[:, None] * levels
        return (
            self.byte_values.flatten()
            .index_select(0, (flat + row).flatten())
            .view_as(batch.patches)
        )

    def vocabulary(self, hidden: Tensor) -> Tensor:
        """Logits of chosen states: (M, D) -> (M, V)."""
        with self.autocast():
            logits: Tensor = self.stock.get_output_embeddings()(hidden)
        return logits

    def embed(self, batch: Batch, layout: Layout) -> Tensor:
        """The L2-normalised last hidden state at each sample's EOS, (S, D) float32.

        Samples are those of the batch that are no fillers, in its order.
        """
        hidden = self(batch, layout, reads=layout.eos_rows)
        return normalize(hidden.float(), dim=-1)
