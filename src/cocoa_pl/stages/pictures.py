"""Tensors of a validation batch in, what a person looks at while it trains out: arrays (H, W, 3) or
texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor

from cocoa_pl.corruption import with_noise
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.stages.chunks import Puzzle

Picture = NDArray[np.float32]

MAX_PICTURES = 8


def hidden_text(puzzle: Puzzle, guesses: Tensor, tokenizer: Any) -> str:
    """The first samples' CONTEXT | TARGET with hidden tokens as blanks, and below it with the
    model's guesses in their place (Markdown).

    Args:
        guesses: (M) int64, what the model takes the hidden tokens for.
    """
    seen, batch = puzzle.seen, puzzle.seen.batch
    hidden = seen.token_mask.nonzero()[:, 0].tolist()
    guessed = dict(zip(hidden, guesses.tolist(), strict=True))
    labels, text = seen.labels.tolist(), batch.text_mask.tolist()
    lines, start = [], 0
    count = min(MAX_PICTURES, batch.num_samples - batch.num_fillers)
    for length, eos in zip(
        batch.lengths.tolist()[:count], batch.eos_positions.tolist(), strict=False
    ):
        shown = [p for p in range(start, start + length) if p in guessed or text[p] or p == eos]
        said = {p: " | " if p == eos else tokenizer.decode([labels[p]]) for p in shown}
        masked = "".join("▁" if p in guessed else said[p] for p in shown)
        rebuilt = "".join(
            tokenizer.decode([guessed[p]]) if p in guessed else said[p] for p in shown
        )
        lines.append(f"- `{_flat(masked)}`\n  → `{_flat(rebuilt)}`")
        start += length
    return "\n".join(lines)


def image_triptychs(backbone: Backbone, puzzle: Puzzle, predicted: Tensor) -> Picture:
    """Original, corrupted and rebuilt image side by side, one row for each of the first images.

    Args:
        predicted: (V, merge_size ** 2 * B), normalised pixels of the hidden visual tokens.
    """
    clean = backbone.pixels(puzzle.batch)
    said = predicted.to(clean.dtype).view(-1, clean.shape[1])
    rebuilt = clean.index_copy(0, puzzle.noise.rows, said)
    versions = (clean, with_noise(clean, puzzle.noise), rebuilt)
    batch, rows, start = puzzle.seen.batch, [], 0
    real = int(batch.images_per_sample[: batch.num_samples - batch.num_fillers].sum())
    for grid in batch.grids.tolist()[: min(MAX_PICTURES, real)]:
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
    picture: Picture = image.clamp(0, 1).cpu().numpy().astype(np.float32)
    return picture


def heat_map(similarity: Tensor) -> Picture:
    """A similarity matrix in [-1, 1] as colours."""
    values = (similarity.float().cpu().numpy() + 1) / 2
    coloured: Picture = colormaps["viridis"](values)[..., :3].astype(np.float32)
    return coloured.repeat(4, axis=0).repeat(4, axis=1)


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
