"""What trains, by the adapter's config, and how many parameters that is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cocoa_pl.planning.shapes import BlockShape, Linear, MergerShape, ModelShape


@dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA on every linear whose full name matches one of the expressions.

    Args:
        lean: DoRA's norms once a step (`models/dora.py`) instead of in every pass.
        dropout_on_base: DoRA multiplies dropped-out inputs by W once more.
    """

    rank: int
    dropout: float
    use_dora: bool
    lean: bool
    dropout_on_base: bool
    targets: tuple[str, ...]

    @property
    def widens(self) -> bool:
        """Inputs go through float32, as peft's own DoRA has them."""
        return self.use_dora and not self.lean

    def adapts(self, linear: Linear, block: int) -> bool:
        name = linear.name.format(block)
        return any(re.fullmatch(expression, name) for expression in self.targets)

    def parameters(self, linear: Linear) -> int:
        """Of one adapted linear: two low-rank matrices, and DoRA's magnitudes."""
        return self.rank * (linear.fan_in + linear.fan_out) + self.use_dora * linear.fan_out


@dataclass(frozen=True)
class Tuning:
    """What trains.

    Args:
        adapter: None for full fine-tuning.
    """

    adapter: Adapter | None

    @property
    def full(self) -> bool:
        return self.adapter is None

    def adapts(self, linear: Linear, block: int = 0) -> bool:
        return self.adapter is not None and self.adapter.adapts(linear, block)

    def learns(self, linear: Linear, block: int = 0) -> bool:
        """Something in this linear trains."""
        return self.full or self.adapts(linear, block)


FULL = Tuning(adapter=None)  # the image decoder, whatever the backbone does


def block_parameters(block: BlockShape, tuning: Tuning) -> int:
    """Trainable parameters in all blocks of a kind."""
    if tuning.adapter is None:
        return block.count * block.parameters
    return sum(
        tuning.adapter.parameters(linear)
        for number in range(block.count)
        for linear in block.linears
        if tuning.adapts(linear, number)
    )


def trained_parameters(shape: ModelShape, tuning: Tuning) -> int:
    """Trainable parameters of the backbone, without heads."""
    if tuning.adapter is None:
        return shape.parameters
    mergers = sum(_merger_parameters(merger, tuning.adapter) for merger in shape.vision.mergers)
    blocks = (shape.text, shape.vision.block)
    return mergers + sum(block_parameters(block, tuning) for block in blocks)


def added_parameters(shape: ModelShape, tuning: Tuning) -> int:
    """Parameters that the adapter brings, beside the model's own."""
    return 0 if tuning.full else trained_parameters(shape, tuning)


def decoder_parameters(shape: ModelShape) -> int:
    """The image decoder: a block of the language model's kind, and a projection to the pixels of
    one frame of a visual token.
    """
    return shape.text.parameters + (shape.text.width + 1) * decoder_values(shape)


def decoder_values(shape: ModelShape) -> int:
    """Pixel values that the image decoder predicts for a visual token."""
    vision = shape.vision
    return 3 * vision.patch_size**2 * vision.merge_size**2


def _merger_parameters(merger: MergerShape, adapter: Adapter) -> int:
    linears = [merger.first, merger.second]
    return sum(adapter.parameters(linear) for linear in linears if adapter.adapts(linear, 0))
