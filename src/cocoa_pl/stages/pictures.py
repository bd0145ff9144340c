"""What a person looks at while a model trains: arrays (H, W, 3) or texts of a validation batch."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor

from cocoa_pl.data.batch import Batch
from cocoa_pl.data.masking import hidden_patches, with_noise
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.backbone import Backbone

Picture = NDArray[np.float32]

MAX_PICTURES = 8


def hidden_text(batch: Batch, guesses: Tensor, processor: Processor) -> str:
    """The first samples' CONTEXT | TARGET with hidden tokens as blanks, and below it with the
    model's guesses in their place (Markdown).

    Args:
        batch: on the host.
        guesses: (M) int64, what the model takes the hidden tokens for.
    """
    decode = processor.tokenizer.decode
    unseen = {processor.image_id, processor.vision_start_id, processor.vision_end_id}
    guessed = dict(zip((batch.token_rows + 1).tolist(), guesses.tolist(), strict=True))
    ids = dict(enumerate(batch.input_ids.tolist()))
    ids |= dict(zip((batch.token_rows + 1).tolist(), batch.targets.tolist(), strict=True))
    lines, start = [], 0
    lengths = batch.segment_lengths[: min(MAX_PICTURES, batch.num_samples)].sum(1).tolist()
    for length, bottleneck in zip(lengths, batch.bottleneck_rows.tolist(), strict=False):
        shown = [p for p in range(start, start + length) if ids[p] not in unseen]
        words = {p: " | " if p in bottleneck else decode([ids[p]]) for p in shown}
        masked = "".join("▁" if p in guessed else words[p] for p in shown)
        rebuilt = "".join(decode([guessed[p]]) if p in guessed else words[p] for p in shown)
        lines.append(f"- `{_flat(masked)}`\n  → `{_flat(rebuilt)}`")
        start += length
    return "\n".join(lines)


def image_triptychs(backbone: Backbone, batch: Batch, predicted: Tensor) -> Picture:
    """Original, masked and rebuilt image side by side, one row for each of the first images.

    Args:
        batch: on the device of the model, with hidden visual tokens.
        predicted: (N, merge_size ** 2 * B), normalised pixels of the hidden visual tokens.
    """
    merge_size = backbone.merge_size
    clean = backbone.pixels(batch)
    patches = predicted.to(clean.dtype).view(-1, clean.shape[1])
    rebuilt = clean.index_copy(0, hidden_patches(batch, merge_size), patches)
    versions = (clean, with_noise(clean, batch, merge_size=merge_size), rebuilt)
    rows, start = [], 0
    for grid in batch.grids.tolist()[:MAX_PICTURES]:
        stop = start + grid[0] * grid[1] * grid[2]
        rows.append(
            np.concatenate([unpatchify(backbone, v[start:stop], grid) for v in versions], axis=1)
        )
        start = stop
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    return np.concatenate(padded)


def unpatchify(backbone: Backbone, pixels: Tensor, grid: list[int]) -> Picture:
    """Normalised patches (p, B) of one image back to (H, W, 3) in [0, 1]."""
    merge, (_, height, width) = backbone.merge_size, grid
    channels = len(backbone.byte_values)
    side = int((pixels.shape[1] // channels) ** 0.5)
    low, high = backbone.byte_values[:, :1], backbone.byte_values[:, -1:]
    values = (pixels.float().view(len(pixels), channels, -1) - low) / (high - low)
    blocks = values.view(height // merge, width // merge, merge, merge, channels, side, side)
    image = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, channels)
    return image.clamp(0, 1).cpu().numpy().astype(np.float32)


def heat_map(similarity: Tensor) -> Picture:
    """A similarity matrix in [-1, 1] as colours."""
    values = (similarity.float().cpu().numpy() + 1) / 2
    coloured = colormaps["viridis"](values)[..., :3].astype(np.float32)
    return coloured.repeat(4, axis=0).repeat(4, axis=1)


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
