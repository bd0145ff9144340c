"""What a generative stage hides of a sample: text tokens to be predicted, visual tokens to be
rebuilt.

Masking happens per sample, in the data workers, by a generator that follows from the run's seed,
the epoch and the row. So it does not depend on packing, on workers or on ranks, and a resumed run
needs no saved generator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cocoa_pl.attention.policy import SEGMENTS
from cocoa_pl.data.batch import TEXT, VISUAL, Batch, Ints, Sample


@dataclass(frozen=True)
class Masking:
    """Hides a share of a sample.

    Args:
        text_ratio: share of text tokens hidden; None asks for every next token and hides nothing
            (plain captioning).
        text_segment: the segment whose text is hidden, `context` or `target`.
        patch_ratio: share of visual tokens hidden.
        mask_token_id: what stands in the place of hidden text.
    """

    text_ratio: float | None
    text_segment: str
    patch_ratio: float
    mask_token_id: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with its mask.

        Of n candidates exactly round(ratio * n) are hidden, at least one; special and visual tokens
        never, nor a sample's very first token, which no state precedes.
        """
        input_ids, is_predictable = sample.input_ids, sample.kinds == TEXT  # (t)
        is_predictable[0] = False
        if self.text_ratio is None:
            end = sample.segment_lengths[0]
            is_predictable[end] = end > 0  # the end token too
            hidden = np.flatnonzero(is_predictable)
        else:
            segment = np.repeat(np.arange(3), sample.segment_lengths)  # (t)
            is_predictable &= segment == SEGMENTS.index(self.text_segment)
            hidden = _choose(np.flatnonzero(is_predictable), self.text_ratio, rng)
            input_ids = input_ids.copy()
            input_ids[hidden] = self.mask_token_id
        hidden_visual, noise_seed = sample.hidden_visual, 0
        if self.patch_ratio:
            visual = np.arange((sample.kinds == VISUAL).sum())
            hidden_visual = _choose(visual, self.patch_ratio, rng)
            noise_seed = int(rng.integers(2**63))
        return replace(
            sample,
            input_ids=input_ids,
            hidden=hidden,
            targets=sample.input_ids[hidden],
            hidden_visual=hidden_visual,
            noise_seed=noise_seed,
        )


def _choose(candidates: Ints, ratio: float, rng: np.random.Generator) -> Ints:
    """round(ratio * n) of n candidates, at least one, in their order."""
    if not len(candidates):
        return candidates
    share = round(ratio * len(candidates), 9)  # 0.7 * 45 is 31.499999999999996
    count = max(1, int(share + 0.5))
    return np.sort(rng.choice(candidates, count, replace=False))


def with_noise(pixels: Tensor, batch: Batch, *, merge_size: int) -> Tensor:
    """Replace the pixels of hidden visual tokens by fresh Gaussian noise (as in MoCa, arXiv
    2506.23115).

    Drawn sample by sample from seeds of their own, so that it does not depend on packing or ranks.

    Args:
        pixels: (P, B) float, normalised, on the device of `batch`.
        merge_size: `merge_size` ** 2 consecutive patches make one visual token.
    """
    if not batch.noise:
        return pixels
    per_token = merge_size**2
    devices = [pixels.device] if pixels.is_cuda else []
    drawn = []
    with torch.random.fork_rng(devices=devices):
        for seed, count in batch.noise:
            torch.manual_seed(seed)
            drawn.append(torch.randn(count * per_token, pixels.shape[1], device=pixels.device))
    noise = torch.cat(drawn).to(pixels.dtype)
    return pixels.index_copy(0, hidden_patches(batch, merge_size), noise)


def hidden_patches(batch: Batch, merge_size: int) -> Tensor:
    """(N * merge_size ** 2) int64, rows of the patches of hidden visual tokens."""
    within = torch.arange(merge_size**2, device=batch.patch_places.device)
    return (batch.patch_places[:, None] * merge_size**2 + within).flatten()
