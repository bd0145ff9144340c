"""Chunks of this rank in, as many chunks that use the same parts of the model on every rank out.

Sharded parameters are gathered by all ranks together, each time a part of the model is used. So
every rank must use the same parts in the same order: as many chunks, and the vision tower for the
same ones. What a rank lacks is made up by fillers, samples that are in no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from cocoa_pl.batch import Batch, pack
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.distributed.collectives import global_max
from cocoa_pl.stages.chunks import AnyChunk, Preparation


@dataclass(frozen=True)
class Fillers:
    """Batches of one sample each, marked as filler: without an image, and with a small one."""

    text: Batch
    image: Batch


def make_fillers(processor: Processor) -> Fillers:
    """The shortest text, and the smallest image that the processor makes."""
    side = processor.patch_size * processor.merge_size
    items = (Item("."), Item(IMAGE_SLOT, (Image.new("RGB", (side, side)),)))
    samples = [
        processor.encode(item, None, key=0, seed=0, row_id="filler of a short rank")
        for item in items
    ]
    return Fillers(*(replace(pack([sample]), num_fillers=1) for sample in samples))


def in_lockstep(
    chunks: Sequence[AnyChunk],
    fillers: Fillers,
    preparation: Preparation[AnyChunk],
    *,
    device: torch.device,
) -> list[AnyChunk]:
    """The chunks, with a filler image behind those that have none where another rank's has one, and
    fillers alone up to the longest list of any rank.

    Every rank must call this at the same time.

    Args:
        chunks: on the host.
        device: where the ranks exchange.
    """
    count = int(global_max(torch.tensor(len(chunks), device=device)))
    has_image = torch.zeros(count, dtype=torch.int32)
    has_image[: len(chunks)] = torch.tensor([len(chunk.batch.grids) > 0 for chunk in chunks])
    anywhere = global_max(has_image.to(device)).tolist()
    filled = [
        preparation.filled(chunk, fillers.image) if seen and not len(chunk.batch.grids) else chunk
        for chunk, seen in zip(chunks, anywhere, strict=False)
    ]
    return filled + [
        preparation.filler(fillers.image if seen else fillers.text)
        for seen in anywhere[len(chunks) :]
    ]
