"""Bytes at the fullest moments of a step.

In the order of a step: patches are hidden; the vision tower runs and still holds its pixels; the
backward pass reaches the image decoder, the vocabulary head, the first and the last block of the
language model, the first and the last block of the vision tower. Each adds what it works with to
what is kept until then. The factors of working memory are measured, as docs/plan.md says.
"""

from __future__ import annotations

from cocoa_pl.planning.activations import FLOAT32, ByteWidths, Kept
from cocoa_pl.planning.shapes import BlockShape, ModelShape
from cocoa_pl.planning.tuning import Tuning, decoder_values
from cocoa_pl.planning.work import Work

HIDING, PIXELS = "hiding patches", "vision forward"
DECODER, HEAD = "image decoder backward", "vocabulary head backward"
TEXT, TEXT_END = "language model backward", "language model backward, last block"
VISION, VISION_END = "vision backward", "vision backward, last block"
HIDING_BYTES = 28  # for each value of noise: int64 counters, hashes and their temporaries


def moments(
    shape: ModelShape,
    tuning: Tuning,
    byte_widths: ByteWidths,
    work: Work,
    kept: Kept,
    *,
    checkpointing: bool,
) -> dict[str, int]:
    """Bytes at each moment of a chunk's forward and backward pass, beside weights and gradients."""
    blocks = kept.vision + kept.text
    working = _backward(shape.text, work.tokens, tuning, byte_widths)
    text_block = kept.text // shape.text.count
    found = {
        HEAD: blocks + kept.head + 2 * work.predicted * shape.vocabulary * FLOAT32,
        TEXT: blocks + kept.text_block * checkpointing + working,
        TEXT_END: kept.vision + _last(text_block, kept.text_block, checkpointing) + working,
    }
    if kept.decoder:
        values = work.rebuilt * decoder_values(shape)
        found[DECODER] = kept.total + 2 * values * FLOAT32
        found[HIDING] = HIDING_BYTES * values
    if work.patches:
        block = shape.vision.block
        working = _backward(block, work.patches, tuning, byte_widths)
        vision_block = kept.vision // block.count
        found[VISION] = kept.vision + kept.vision_block * checkpointing + working
        found[VISION_END] = _last(vision_block, kept.vision_block, checkpointing) + working
        pixels = _pixels(shape, tuning, byte_widths, work)
        found[PIXELS] = kept.vision + pixels + _forward(block, work.patches, tuning, byte_widths)
    return found


def without_graph(shape: ModelShape, tuning: Tuning, byte_widths: ByteWidths, work: Work) -> int:
    """Bytes at the fullest moment of a forward pass that keeps nothing."""
    text = _forward(shape.text, work.tokens, tuning, byte_widths)
    vision = _forward(shape.vision.block, work.patches, tuning, byte_widths)
    return max(text, vision + _pixels(shape, tuning, byte_widths, work))


def _last(inputs: int, block: int, checkpointing: bool) -> int:
    return inputs + block if checkpointing else inputs


def _pixels(shape: ModelShape, tuning: Tuning, byte_widths: ByteWidths, work: Work) -> int:
    """Float pixels, the same with noise where patches are hidden, both frames of them, and these
    in the tower's width where that is another; what is kept of these for the backward pass, with
    full tuning the last, is counted there.
    """
    values = work.patches * shape.vision.patch_values  # of both frames
    widths = [FLOAT32, *([byte_widths.product] if byte_widths.product != FLOAT32 else [])]
    passing = widths[:-1] if tuning.full else widths
    return values // 2 * FLOAT32 * (1 + (work.rebuilt > 0)) + values * sum(passing)


def _forward(block: BlockShape, rows: int, tuning: Tuning, byte_widths: ByteWidths) -> int:
    """Inner states of a perceptron; with adapters what the last one is fed, also in float32 where
    it is widened, its mask, the dropped-out copy and one temporary; and DoRA's two scaled results.
    """
    width, adapter = 4 * byte_widths.product, tuning.adapter
    if adapter is not None:
        copy = FLOAT32 * (byte_widths.dropped(adapter) != byte_widths.product)
        width = byte_widths.product + copy + byte_widths.mask(adapter) + 2 * FLOAT32
        width += 2 * FLOAT32 * adapter.use_dora
    return rows * block.intermediate * width


def _backward(block: BlockShape, rows: int, tuning: Tuning, byte_widths: ByteWidths) -> int:
    """Gradients of a perceptron's inner states, and what its last linear works with."""
    adapter = tuning.adapter
    if adapter is None:  # a weight's gradient in both widths
        inner = 2 * rows * block.intermediate * byte_widths.product
        both = block.intermediate * block.width * (byte_widths.product + FLOAT32)
        return inner + both * byte_widths.casts
    inner = 2 * rows * block.intermediate * byte_widths.dropped(adapter)
    inner += 3 * rows * block.width * FLOAT32
    if adapter.use_dora:
        inner += rows * block.width * FLOAT32  # a third scaled result
    if adapter.widens:  # three matrices for the norm of W + B A, the identity behind them
        narrow = byte_widths.product * (byte_widths.product != FLOAT32)
        inner += 3 * block.intermediate * block.width * FLOAT32
        inner += block.intermediate**2 * (FLOAT32 + narrow)
    return inner
