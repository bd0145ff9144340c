"""The sizes that parameters, operations and bytes follow from; `families.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A matrix and where it is in the model; `{}` in the name stands for the block's number."""

    name: str
    fan_in: int
    fan_out: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.fan_in * self.fan_out + self.bias * self.fan_out


@dataclass(frozen=True)
class BlockShape:
    """A transformer block, of the language model or of the vision tower.

    Attributes:
        count: equal blocks, one after the other.
        key_heads: heads of keys and values.
        inputs, output: linears in front of and behind attention.
        up, down: linears in front of and behind the activation; two in front where it is gated.
        layer_norm: LayerNorm (scale and shift) instead of RMSNorm (scale).
        query_norm: RMSNorm of each head's queries and keys.
    """

    count: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    activation: str
    inputs: tuple[Linear, ...]
    output: Linear
    up: tuple[Linear, ...]
    down: Linear
    layer_norm: bool
    query_norm: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.inputs, self.output, *self.up, self.down)

    @property
    def parameters(self) -> int:
        """Of one block."""
        norms = 2 * self.width * (1 + self.layer_norm) + 2 * self.head_dim * self.query_norm
        return sum(linear.parameters for linear in self.linears) + norms


@dataclass(frozen=True)
class MergerShape:
    """What makes one visual token of merge_size ** 2 patches: a norm and two linears."""

    norm_width: int  # of what the norm sees: one patch, or all of a token's
    layer_norm: bool
    first: Linear
    second: Linear

    @property
    def parameters(self) -> int:
        norm = self.norm_width * (1 + self.layer_norm)
        return self.first.parameters + self.second.parameters + norm


@dataclass(frozen=True)
class VisionShape:
    """The vision tower.

    Attributes:
        patch_values: of one patch with its temporal copy.
        position_rows: of a learnt position table; 0 for none.
        window: side of an attention window in patches; 0 where every block sees whole images.
        full_blocks: how many blocks see whole images.
        input_hook: transformers' `enable_input_require_grads`, which gradient checkpointing comes
            with, reaches the patch embedding.
        mergers: the tower's own, then those of DeepStack.
    """

    block: BlockShape
    patch_size: int
    merge_size: int
    patch_values: int
    patch_bias: bool
    position_rows: int
    window: int
    full_blocks: int
    input_hook: bool
    mergers: tuple[MergerShape, ...]

    @property
    def parameters(self) -> int:
        width = self.block.width
        patches = self.patch_values * width + self.patch_bias * width
        mergers = sum(merger.parameters for merger in self.mergers)
        blocks = self.block.count * self.block.parameters
        return patches + self.position_rows * width + blocks + mergers


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model.

    Attributes:
        vocabulary: rows of the token embedding, reserved ones included.
        tied: the vocabulary head is the token embedding.
    """

    text: BlockShape
    vision: VisionShape
    vocabulary: int
    tied: bool

    @property
    def embedding_parameters(self) -> int:
        """The token embedding, and the vocabulary head where it is another matrix."""
        return (2 - self.tied) * self.vocabulary * self.text.width

    @property
    def text_parameters(self) -> int:
        """The blocks and the last norm."""
        return self.text.count * self.text.parameters + self.text.width

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.text_parameters + self.vision.parameters
