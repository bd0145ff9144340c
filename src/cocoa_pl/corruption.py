"""A batch in; the same batch with some tokens or patches hidden out, and which ones.

`token_mask` True = text token hidden and to be predicted; `patch_mask` True = visual token hidden
and to be rebuilt. What is hidden follows from each sample's seed alone (`randomness.py`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cocoa_pl.batch import SEGMENTS, Batch
from cocoa_pl.randomness import normal, uniform

_TEXT_STREAM, _PATCH_STREAM, _NOISE_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Corrupted:
    """A batch as the model sees it, and what it must say."""

    batch: Batch
    labels: Tensor  # (T) the uncorrupted tokens
    token_mask: Tensor  # (T) bool, tokens to predict
    patch_mask: Tensor  # (T) bool, visual tokens to rebuild
    pixels: Tensor  # (P, B) clean
    corrupted_pixels: Tensor  # (P, B)


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


def hide_patches(
    batch: Batch, pixels: Tensor, *, ratio: float, merge_size: int
) -> tuple[Tensor, Tensor]:
    """Replace the pixels of a share of each sample's visual tokens by fresh Gaussian noise.

    Args:
        pixels: (P, B) float, normalised; `merge_size` ** 2 consecutive patches make one visual
            token.

    Returns:
        Corrupted pixels (P, B) and `patch_mask` (T) bool. Noise as in MoCa (arXiv 2506.23115).
    """
    patch_mask = _choose(batch, batch.image_mask, ratio, _PATCH_STREAM)
    hidden = patch_mask[batch.image_mask].repeat_interleave(merge_size**2)  # (P)
    rows = hidden.nonzero()[:, 0]
    sample = torch.repeat_interleave(torch.arange(batch.num_samples), batch.patches_per_sample)
    first = (batch.patches_per_sample.cumsum(0) - batch.patches_per_sample)[sample]
    within = (torch.arange(len(sample)) - first).to(pixels.device)[rows]  # patch within its sample
    counters = within[:, None] * pixels.shape[1] + torch.arange(
        pixels.shape[1], device=pixels.device
    )
    seeds = batch.seeds[sample.to(pixels.device)[rows]]
    noise = normal(seeds[:, None], counters, stream=_NOISE_STREAM)
    return pixels.index_copy(0, rows, noise.to(pixels.dtype)), patch_mask


def hideable_text(batch: Batch, segment: str) -> Tensor:
    """(T) bool: ordinary text of one segment that has a state before it to be predicted from."""
    is_segment = torch.repeat_interleave(
        torch.tensor([name == segment for name in SEGMENTS]).repeat(batch.num_samples),
        batch.segment_lengths.flatten(),
    ).to(batch.text_mask.device)
    eligible = batch.text_mask & is_segment
    first = (batch.lengths.cumsum(0) - batch.lengths).to(eligible.device)
    return eligible.index_fill(0, first, False)


def every_next_token(batch: Batch) -> Tensor:
    """(T) bool: what plain captioning predicts, all ordinary text and the end token."""
    token_mask = hideable_text(batch, "context") | hideable_text(batch, "target")
    preceded = batch.eos_positions[batch.segment_lengths[:, 0] > 0]
    return token_mask.index_fill(0, preceded.to(token_mask.device), True)


def _choose(batch: Batch, eligible: Tensor, ratio: float, stream: int) -> Tensor:
    """Pick round(ratio * n) of each sample's n eligible tokens, at least one: (T) bool."""
    device = eligible.device
    lengths = batch.lengths
    sample = torch.repeat_interleave(torch.arange(batch.num_samples), lengths)
    start = (lengths.cumsum(0) - lengths)[sample]
    within = torch.arange(len(sample)) - start
    sample, start, within = sample.to(device), start.to(device), within.to(device)
    draw = uniform(batch.seeds[sample], within, stream=stream)
    order = torch.argsort(
        sample.double() * 4 + torch.where(eligible, draw, 3.0).double(), stable=True
    )
    rank = (
        torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device))
        - start
    )
    available = torch.zeros_like(batch.seeds).index_add_(0, sample, eligible.long())
    wanted = torch.floor(ratio * available + 0.5).long().clamp(min=1)
    return eligible & (rank < wanted[sample])
