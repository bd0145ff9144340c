"""Bytes that a chunk's forward pass keeps for its backward pass.

Autograd keeps what an operation's gradient asks for, and nothing of an operation whose inputs need
no gradient. Every term below is one kept tensor; docs/plan.md has them as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cocoa_pl.planning.shapes import BlockShape, Linear, MergerShape, ModelShape
from cocoa_pl.planning.tuning import FULL, Adapter, Tuning, decoder_values
from cocoa_pl.planning.work import Attention, Work

FLOAT32 = 4
KEPT_BY = {"silu": 1, "quick_gelu": 2, "gelu_pytorch_tanh": 1, "gelu": 1}  # tensors of its width


@dataclass(frozen=True)
class ByteWidths:
    """Bytes of a number, by what it is used for.

    Args:
        product: inputs and outputs of matrix products.
        weight: a weight when it is used; where it is wider than a product, autocast makes a copy.
        on_gpu: CUDA keeps dropout masks as bytes and normalises in float32 under autocast; the CPU
            keeps masks in the width of what is dropped and normalises in the width that it finds.
    """

    product: int
    weight: int
    on_gpu: bool

    @property
    def casts(self) -> bool:
        return self.weight != self.product

    def dropped(self, adapter: Adapter) -> int:
        """Of what adapters drop out."""
        return FLOAT32 if adapter.widens else self.product

    def mask(self, adapter: Adapter) -> int:
        return 1 if self.on_gpu else self.dropped(adapter)

    @property
    def layer_norm(self) -> int:
        return FLOAT32 if self.on_gpu else self.product


@dataclass(frozen=True)
class Kept:
    """Bytes that lie between the forward and the backward pass of one chunk.

    Attributes:
        vision, text: of all blocks with norms and mergers around them, or of their inputs alone
            under checkpointing.
        vision_block, text_block: of the largest single block, without checkpointing.
        head: logits' log-probabilities and what the vocabulary head keeps.
        decoder: of the image decoder and its squared errors.
    """

    vision: int
    text: int
    vision_block: int
    text_block: int
    head: int
    decoder: int

    @property
    def total(self) -> int:
        return self.vision + self.text + self.head + self.decoder


def kept_by_chunk(
    shape: ModelShape,
    tuning: Tuning,
    widths: ByteWidths,
    work: Work,
    *,
    checkpointing: bool,
    decoder: bool,
) -> Kept:
    """Bytes that one chunk keeps between its passes.

    Args:
        checkpointing: blocks of both towers keep their inputs alone.
        decoder: the image decoder runs (never checkpointed).
    """
    vision, vision_block, requires_grad = _vision(shape, tuning, widths, work, checkpointing)
    requires_grad = requires_grad or tuning.full or checkpointing
    text = shape.text
    residual = widths.weight  # what the token embedding gives
    blocks = []
    for number in range(text.count):
        kept, requires_grad = _block(
            text, number, work.tokens, work.text, tuning, widths, residual, requires_grad
        )
        blocks.append(kept)
    inputs = text.count * work.tokens * text.width * residual
    rotary = 2 * work.tokens * text.head_dim * residual
    last = _rms_norm(work.tokens, text.width, residual, tuning.full) if requires_grad else 0
    hooked = work.tokens * text.width * residual * (checkpointing and not tuning.full)
    return Kept(
        vision=vision,
        text=(inputs if checkpointing else sum(blocks))
        + rotary
        + last
        + hooked
        + _indices(work) * widths.on_gpu,
        vision_block=vision_block,
        text_block=max(blocks),
        head=_head(shape, tuning, widths, work) if work.predicted else 0,
        decoder=_decoder(shape, widths, work) if decoder else 0,
    )


def _vision(
    shape: ModelShape, tuning: Tuning, widths: ByteWidths, work: Work, checkpointing: bool
) -> tuple[int, int, bool]:
    """Bytes of the tower, of its largest block, and whether its tokens need a gradient."""
    vision, patches = shape.vision, work.patches
    if not patches:
        return 0, 0, False
    requires_grad = tuning.full or (checkpointing and vision.input_hook)
    kept = patches * vision.patch_values * widths.product * tuning.full
    kept += _weight_copy(vision.patch_values, vision.block.width, widths) * tuning.full
    blocks = []
    for number in range(vision.block.count):
        attention = work.images if number < vision.full_blocks else work.windows
        one, requires_grad = _block(
            vision.block,
            number,
            patches,
            attention,
            tuning,
            widths,
            widths.product,
            requires_grad,
        )
        blocks.append(one)
    inputs = vision.block.count * patches * vision.block.width * widths.product
    if vision.window and checkpointing and not tuning.full:  # in both orders
        kept += patches * vision.block.width * widths.product
    kept += inputs if checkpointing else sum(blocks)
    kept += 2 * patches * vision.block.head_dim * FLOAT32  # cosines and sines, for all blocks
    tokens = work.visual_tokens
    merged = [_merger(merger, tokens, tuning, widths, requires_grad) for merger in vision.mergers]
    learns = any(tuning.learns(m.first) or tuning.learns(m.second) for m in vision.mergers)
    return kept + sum(merged), max(blocks), requires_grad or learns


def _indices(work: Work) -> int:
    """Which token stands in which slot and back, int64."""
    calls = (work.text, work.images, work.windows)
    slots = sum(call.queries + call.keys for call in calls)
    return 8 * (slots + work.tokens + work.patches)


def _block(
    block: BlockShape,
    number: int,
    rows: int,
    attention: Attention,
    tuning: Tuning,
    widths: ByteWidths,
    residual: int,
    requires_grad: bool,
) -> tuple[int, bool]:
    """Bytes that one block keeps, and whether its output needs a gradient."""

    def linears(group: Sequence[Linear], requires_grad: bool, *, cast: bool) -> int:
        kept = [_linear(one, number, rows, tuning, widths, requires_grad) for one in group]
        if tuning.full:  # the input, once for all unless each of them casts it
            copies = len(group) if cast and widths.casts else 1
            kept.append(copies * rows * group[0].fan_in * widths.product)
        return sum(kept)

    def learns(group: Sequence[Linear]) -> bool:
        return any(tuning.learns(one, number) for one in group)

    kept = _norm(block, rows, residual, tuning, widths) if requires_grad else 0
    kept += linears(block.inputs, requires_grad, cast=not block.layer_norm)
    attends = requires_grad or learns(block.inputs)
    if attends:
        kept += _attention(block, rows, attention, tuning, widths)
    kept += linears([block.output], attends, cast=False)
    requires_grad = attends or learns([block.output])
    kept += _norm(block, rows, residual, tuning, widths) if requires_grad else 0
    kept += linears(block.up, requires_grad, cast=not block.layer_norm)
    raised = requires_grad or learns(block.up)
    gated = len(block.up) > 1
    if raised:  # of a gated activation also both factors of the product
        tensors = KEPT_BY[block.activation] + 2 * gated
        kept += tensors * rows * block.intermediate * widths.product
    kept += linears([block.down], raised, cast=False)
    return kept, raised or learns([block.down])


def _linear(
    linear: Linear, number: int, rows: int, tuning: Tuning, widths: ByteWidths, requires_grad: bool
) -> int:
    """Beyond its input: copies that autocast makes of its weight, and what its adapter keeps."""
    copy = _weight_copy(linear.fan_in, linear.fan_out, widths)
    if tuning.full:
        return copy * requires_grad
    adapter, width = tuning.adapter, widths.product
    if adapter is None or not tuning.adapts(linear, number):
        return 0
    kept = rows * (linear.fan_in + adapter.rank) * width  # inputs of A and B
    kept += rows * linear.fan_in * widths.mask(adapter) * bool(adapter.dropout) * requires_grad
    low_rank = adapter.rank * (linear.fan_in + linear.fan_out)
    kept += low_rank * width * (width != FLOAT32)
    if adapter.use_dora:
        # Both results that its magnitudes scale, and W itself where it went through float32.
        kept += 2 * rows * linear.fan_out * width
        widened = adapter.widens and width != FLOAT32
        kept += linear.fan_in * linear.fan_out * width * widened * requires_grad
    return kept


def _weight_copy(fan_in: int, fan_out: int, widths: ByteWidths) -> int:
    return fan_in * fan_out * widths.product * widths.casts


def _norm(block: BlockShape, rows: int, residual: int, tuning: Tuning, widths: ByteWidths) -> int:
    if block.layer_norm:
        return rows * (block.width * widths.layer_norm + 2 * FLOAT32)
    return _rms_norm(rows, block.width, residual, tuning.full)


def _rms_norm(rows: int, width: int, residual: int, learns: bool) -> int:
    """The input in float32, its inverse root mean square, and the normalised input for the scale's
    gradient.
    """
    return rows * (width * FLOAT32 + FLOAT32 + learns * width * residual)


def _attention(
    block: BlockShape, rows: int, attention: Attention, tuning: Tuning, widths: ByteWidths
) -> int:
    """Queries, keys, values and outputs in padded slots, and a float32 log-sum of each query."""
    queries, keys = block.heads * block.head_dim, block.key_heads * block.head_dim
    slots = 2 * attention.queries * queries + 2 * attention.keys * keys
    kept = slots * widths.product + attention.queries * block.heads * FLOAT32
    if block.query_norm:
        for heads in (block.heads, block.key_heads):
            kept += _rms_norm(rows * heads, block.head_dim, widths.product, tuning.full)
    return kept


def _merger(
    merger: MergerShape, rows: int, tuning: Tuning, widths: ByteWidths, requires_grad: bool
) -> int:
    """A norm over patches or whole tokens, two linears, a GELU between them."""
    per_token = merger.first.fan_in
    norm_rows = rows * per_token // merger.norm_width
    kept = 0
    if requires_grad and merger.layer_norm:
        kept += norm_rows * (merger.norm_width * widths.layer_norm + 2 * FLOAT32)
    elif requires_grad:
        kept += _rms_norm(norm_rows, merger.norm_width, widths.product, tuning.full)
    for linear in (merger.first, merger.second):
        kept += rows * linear.fan_in * widths.product * tuning.full
        kept += _linear(linear, 0, rows, tuning, widths, requires_grad)
        requires_grad = requires_grad or tuning.learns(linear)
    return kept + rows * merger.first.fan_out * widths.product * requires_grad


def _head(shape: ModelShape, tuning: Tuning, widths: ByteWidths, work: Work) -> int:
    width = shape.text.width
    kept = work.predicted * width * widths.product * tuning.full
    kept += _weight_copy(width, shape.vocabulary, widths) * tuning.full
    return kept + work.predicted * shape.vocabulary * FLOAT32


def _decoder(shape: ModelShape, widths: ByteWidths, work: Work) -> int:
    text, values = shape.text, decoder_values(shape)
    own = ByteWidths(widths.product, FLOAT32, widths.on_gpu)  # its weights are float32 always
    kept, _ = _block(text, 0, work.tokens, work.text, FULL, own, widths.weight, True)
    kept += 2 * work.tokens * text.head_dim * FLOAT32
    kept += work.rebuilt * text.width * widths.product + _weight_copy(text.width, values, own)
    return kept + 2 * work.rebuilt * values * FLOAT32  # prediction and target of the squared error
