"""Bytes on one GPU, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cocoa_pl.distributed.collectives import BUCKET_BYTES
from cocoa_pl.planning import peaks
from cocoa_pl.planning.activations import FLOAT32, ByteWidths, Kept, kept_by_chunk
from cocoa_pl.planning.shapes import ModelShape
from cocoa_pl.planning.tuning import (
    Adapter,
    Tuning,
    added_parameters,
    block_parameters,
    decoder_parameters,
    trained_parameters,
)
from cocoa_pl.planning.work import Work

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
ACTIVATIONS, BATCH, EMBEDDINGS = "activations", "batch", "embeddings and similarities"
GATHERED, BUFFERS = "gathered blocks", "gradient exchange"


@dataclass(frozen=True)
class Setup:
    """What memory and time depend on, beside the data.

    Args:
        width: bytes of inputs and outputs of matrix products, 4 (float32) or 2 (bfloat16).
        sharded: weights, gradients and optimizer state are split over the GPUs (FSDP2).
        on_gpu: False for the CPU, which keeps other masks (see `activations.ByteWidths`).
    """

    shape: ModelShape
    adapter: Adapter | None
    width: int
    checkpointing: bool
    sharded: bool
    gpus: int
    kernel: str
    on_gpu: bool = True

    @property
    def tuning(self) -> Tuning:
        return Tuning(self.adapter)

    @property
    def shards(self) -> int:
        return self.gpus if self.sharded else 1

    @property
    def weight_width(self) -> int:
        """Bytes of a weight of the model where it is kept: what trains is float32."""
        return FLOAT32 if self.tuning.full else self.width

    @property
    def widths(self) -> ByteWidths:
        # FSDP2 gathers weights in the type of the products; otherwise autocast copies them.
        used = self.width if self.sharded else self.weight_width
        return ByteWidths(product=self.width, weight=used, on_gpu=self.on_gpu)

    def with_changes(self, **changes: object) -> Setup:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ChunkLoad:
    """The chunks of one step of one process, in order.

    Args:
        decoder: the image decoder runs.
        cached: more than one chunk under one loss: embeddings are kept.
        rows, candidates: queries of this process, and candidates of all processes; 0 where there
            is no contrast.
    """

    works: Sequence[Work]
    decoder: bool
    cached: bool
    rows: int
    candidates: int

    @property
    def patches(self) -> int:
        """Of the largest chunk; the others wait on the host."""
        return max(work.patches for work in self.works)

    @property
    def samples(self) -> int:
        return sum(work.samples for work in self.works)


def memory_by_part(setup: Setup, load: ChunkLoad) -> dict[str, int]:
    """Bytes on each GPU at the fullest moment of a step, without the CUDA context and the
    allocator's slack.
    """
    parts = static_memory(setup, decoder=load.decoder)
    gradients = parts[GRADIENTS] * setup.shards
    parts[ACTIVATIONS] = activation_peak(setup, load, gradients)
    parts[BATCH] = _batch(setup, load)
    if load.rows:
        parts[EMBEDDINGS] = _embeddings(setup, load)
    if setup.sharded:
        parts[GATHERED] = _gathered(setup, decoder=load.decoder)
    elif setup.gpus > 1:
        parts[BUFFERS] = _exchange(setup, gradients)
    return parts


def static_memory(setup: Setup, *, decoder: bool) -> dict[str, int]:
    """Weights, gradients and AdamW's two moments, split over GPUs where they are sharded."""
    own, extra = setup.shape.parameters * setup.weight_width, 0
    trained = trained_parameters(setup.shape, setup.tuning)
    if decoder:
        extra = decoder_parameters(setup.shape)
    heads = added_parameters(setup.shape, setup.tuning) + extra
    learnt = (trained + extra) * FLOAT32
    return {
        WEIGHTS: (own + heads * FLOAT32) // setup.shards,
        GRADIENTS: learnt // setup.shards,
        OPTIMIZER: 2 * learnt // setup.shards,
    }


def activation_peak(setup: Setup, load: ChunkLoad, gradients: int) -> int:
    """Bytes beyond weights, gradients and optimizer state at the fullest moment.

    During the first chunk most gradients are not there yet, and its activations take their place.

    Args:
        gradients: bytes of all gradients of this process, whole.
    """
    missing = _missing(setup, gradients, decoder=load.decoder)
    highest = 0
    first_graph = graph(setup, load.decoder, load.works[0]).total
    measured: dict[Work, dict[str, int]] = {}
    for number, work in enumerate(load.works):
        if work not in measured:
            measured[work] = chunk_moments(setup, load, work)
        first = number == 0 and not setup.sharded
        for name, size in measured[work].items():
            absent = missing[name] if first else gradients if name == peaks.HIDING else 0
            highest = max(highest, size - absent)
        if load.cached and number:
            graphless = peaks.without_graph(setup.shape, setup.tuning, setup.widths, work)
            highest = max(highest, graphless - gradients + first_graph)
    return highest


def graph(setup: Setup, decoder: bool, work: Work) -> Kept:
    """What one chunk keeps between its forward and its backward pass."""
    return kept_by_chunk(
        setup.shape,
        setup.tuning,
        setup.widths,
        work,
        checkpointing=setup.checkpointing,
        decoder=decoder,
    )


def chunk_moments(setup: Setup, load: ChunkLoad, work: Work) -> dict[str, int]:
    """Bytes at each moment of one chunk, by the names of `peaks`."""
    return peaks.moments(
        setup.shape,
        setup.tuning,
        setup.widths,
        work,
        graph(setup, load.decoder, work),
        checkpointing=setup.checkpointing,
    )


def _missing(setup: Setup, gradients: int, *, decoder: bool) -> dict[str, int]:
    """Gradients that are not there yet at a moment of the first chunk: those of all layers that
    its backward pass has yet to reach.
    """
    text, vision = (
        block_parameters(block, setup.tuning) * FLOAT32
        for block in (setup.shape.text, setup.shape.vision.block)
    )
    backbone = gradients - decoder_parameters(setup.shape) * FLOAT32 * decoder
    missing = dict.fromkeys((peaks.HIDING, peaks.PIXELS, peaks.DECODER), gradients)
    missing |= dict.fromkeys((peaks.HEAD, peaks.TEXT), backbone)
    missing[peaks.TEXT_END] = backbone - text + text // setup.shape.text.count
    missing[peaks.VISION] = backbone - text
    rest = vision // setup.shape.vision.block.count
    missing[peaks.VISION_END] = backbone - text - vision + rest
    return missing


def _batch(setup: Setup, load: ChunkLoad) -> int:
    """uint8 patches of a chunk."""
    return load.patches * setup.shape.vision.patch_values // 2  # one frame


def _embeddings(setup: Setup, load: ChunkLoad) -> int:
    """Own embeddings with gradient, candidates of all ranks with gradient, and five tables of
    similarities: plain, scaled, masked, log-probabilities, gradient.
    """
    width = setup.shape.text.width
    vectors = 2 * (load.samples + load.candidates) * width * FLOAT32
    return vectors + load.rows * load.candidates * (5 * FLOAT32 + 1)


def _gathered(setup: Setup, *, decoder: bool) -> int:
    """Weights that FSDP2 holds whole: what is in no block, two blocks (one runs, one arrives), the
    flat buffer that one arrives in, and a block's gradients before and while they are reduced.
    """
    shape, width = setup.shape, setup.widths.weight
    blocks = (shape.text, shape.vision.block)
    outside = shape.parameters - sum(block.count * block.parameters for block in blocks)
    largest = max(block.parameters for block in blocks)
    trained = max(block_parameters(block, setup.tuning) // block.count for block in blocks)
    whole = outside * width + decoder_parameters(shape) * width * decoder
    return whole + 3 * largest * width + trained * (width + FLOAT32)


def _exchange(setup: Setup, gradients: int) -> int:
    """A flat bucket of gradients, where every GPU has all of them."""
    table = setup.shape.vocabulary * setup.shape.text.width * FLOAT32
    largest = table if setup.tuning.full else 0  # a tensor larger than a bucket is one alone
    return min(gradients, max(BUCKET_BYTES, largest))
