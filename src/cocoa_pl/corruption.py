"""A batch in; the same batch with some tokens or patches hidden out, and which ones.

`token_mask` True = text token hidden and to be predicted; `patch_mask` True = visual token hidden
and to be rebuilt. What is hidden follows from each sample's seed alone (`randomness.py`). Which
tokens are hidden is decided on the host, in the workers; pixels and noise are the device's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cocoa_pl.attention import SEGMENTS
from cocoa_pl.batch import Batch, join, rows_of
from cocoa_pl.randomness import normal, uniform

_TEXT_STREAM, _PATCH_STREAM, _NOISE_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Corrupted:
    """A batch as the model sees it, and what it must say; all of it on the host."""

    batch: Batch  # hidden text is the mask token
    labels: Tensor  # (T) the uncorrupted tokens
    token_mask: Tensor  # (T) bool, tokens to predict
    patch_mask: Tensor  # (T) bool, visual tokens to rebuild

    def take(self, samples: Tensor) -> Corrupted:
        """Chosen samples in a chosen order."""
        tokens = rows_of(samples, self.batch.lengths)
        return Corrupted(
            self.batch.take(samples),
            self.labels[tokens],
            self.token_mask[tokens],
            self.patch_mask[tokens],
        )


@dataclass(frozen=True)
class Corruption:
    """What a stage hides.

    Args:
        text_ratio: share of text tokens hidden; None asks for every next token and hides nothing
            (plain captioning).
        text_segment: the segment whose text is hidden, `context` or `target`.
        patch_ratio: share of visual tokens hidden.
        merge_size: `merge_size` ** 2 patches make one visual token.
    """

    text_ratio: float | None
    text_segment: str
    patch_ratio: float
    mask_token_id: int
    merge_size: int

    def __call__(self, batch: Batch) -> Corrupted:
        if self.text_ratio is None:
            seen, token_mask = batch, every_next_token(batch)
        else:
            seen, token_mask = hide_text(
                batch,
                ratio=self.text_ratio,
                segment=self.text_segment,
                mask_token_id=self.mask_token_id,
            )
        patch_mask = torch.zeros_like(token_mask)
        if self.patch_ratio:
            patch_mask = choose_patches(batch, ratio=self.patch_ratio)
        return Corrupted(seen, batch.input_ids, token_mask, patch_mask)


@dataclass(frozen=True)
class Noise:
    """Which patches are replaced by noise, and what that noise follows from.

    Of a hidden visual token all patches are noise.
    """

    rows: Tensor  # (N) int64, patches of the batch
    seeds: Tensor  # (N) int64, of their samples
    places: Tensor  # (N) int64, the patch's place within its sample


def join_corrupted(parts: Sequence[Corrupted]) -> Corrupted:
    """End to end as one; only the last may have fillers."""
    return Corrupted(
        join([part.batch for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.token_mask for part in parts]),
        torch.cat([part.patch_mask for part in parts]),
    )


def untouched(batch: Batch) -> Corrupted:
    """A batch of which nothing is to be said."""
    nothing = torch.zeros_like(batch.text_mask)
    return Corrupted(batch, batch.input_ids, nothing, nothing)


def hide_text(
    batch: Batch, *, ratio: float, segment: str, mask_token_id: int
) -> tuple[Batch, Tensor]:
    """Replace a share of one segment's ordinary text tokens by the mask token.

    Of n candidates in a sample exactly round(ratio * n) are hidden, at least one; special and
    visual tokens never, nor a sample's very first token, which no state precedes.

    Returns:
        The corrupted batch and `token_mask` (T) bool.
    """
    token_mask = _choose(batch, hideable_text(batch, segment), ratio, _TEXT_STREAM)
    return replace(
        batch, input_ids=batch.input_ids.masked_fill(token_mask, mask_token_id)
    ), token_mask


def choose_patches(batch: Batch, *, ratio: float) -> Tensor:
    """A share of each sample's visual tokens, as many as `hide_text` would: (T) bool."""
    return _choose(batch, batch.image_mask, ratio, _PATCH_STREAM)


def noise_of(batch: Batch, patch_mask: Tensor, *, merge_size: int) -> Noise:
    """The noise in the place of hidden visual tokens.

    Args:
        patch_mask: (T) bool, the hidden ones.
        merge_size: `merge_size` ** 2 consecutive patches make one visual token.
    """
    rows = patch_mask[batch.image_mask].repeat_interleave(merge_size**2).nonzero()[:, 0]
    counts = batch.patches_per_sample
    sample = torch.repeat_interleave(torch.arange(batch.num_samples), counts)[rows]
    return Noise(rows, batch.seeds[sample], rows - (counts.cumsum(0) - counts)[sample])


def with_noise(pixels: Tensor, noise: Noise) -> Tensor:
    """Replace the pixels of hidden patches by fresh Gaussian noise (as in MoCa, arXiv 2506.23115).

    Args:
        pixels: (P, B) float, normalised.
        noise: on the same device.
    """
    size = pixels.shape[1]
    values = torch.arange(size, device=pixels.device)
    counters = noise.places[:, None] * size + values
    drawn = normal(noise.seeds[:, None], counters, stream=_NOISE_STREAM)
    return pixels.index_copy(0, noise.rows, drawn.to(pixels.dtype))


def hideable_text(batch: Batch, segment: str) -> Tensor:
    """(T) bool: ordinary text of one segment that has a state before it to be predicted from."""
    is_segment = torch.repeat_interleave(
        torch.tensor([name == segment for name in SEGMENTS]).repeat(batch.num_samples),
        batch.segment_lengths.flatten(),
    )
    first = batch.lengths.cumsum(0) - batch.lengths
    return (batch.text_mask & is_segment).index_fill(0, first, False)


def every_next_token(batch: Batch) -> Tensor:
    """(T) bool: what plain captioning predicts, all ordinary text and the end token."""
    token_mask = hideable_text(batch, "context") | hideable_text(batch, "target")
    preceded = batch.eos_positions[batch.segment_lengths[:, 0] > 0]
    return token_mask.index_fill(0, preceded, True)


def _choose(batch: Batch, eligible: Tensor, ratio: float, stream: int) -> Tensor:
    """Pick round(ratio * n) of each sample's n eligible tokens, at least one: (T) bool."""
    lengths = batch.lengths
    sample = torch.repeat_interleave(torch.arange(batch.num_samples), lengths)
    start = (lengths.cumsum(0) - lengths)[sample]
    draw = uniform(batch.seeds[sample], torch.arange(len(sample)) - start, stream=stream)
    order = torch.argsort(
        sample.double() * 4 + torch.where(eligible, draw, 3.0).double(), stable=True
    )
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order))) - start
    available = torch.zeros_like(batch.seeds).index_add_(0, sample, eligible.long())
    wanted = torch.floor(ratio * available + 0.5).long().clamp(min=1)
    return eligible & (rank < wanted[sample])
