"""Encoded samples in, one packed `Batch` out: samples end to end in a row of T tokens, no padding.

Shape legend: T tokens, S samples, I images, P patches, B bytes of one patch (channels x side x
side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cocoa_pl.attention import ranges

# Of a visual token beyond a text token: the vision tower computes for its four patches. On
# Qwen2-VL-2B it costs 3.2 text tokens in all; MoCa (arXiv 2506.23115) counts 4.
VISUAL_TOKEN_COST = 2


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: CONTEXT, EOS and TARGET tokens in this order, with the patches of its images.

    The collator *writes* the segment lengths; nobody searches for EOS in `input_ids` later.
    """

    input_ids: Tensor  # (t) int64
    position_ids: Tensor  # (3, t) int64, M-RoPE: temporal, height, width
    text_mask: (
        Tensor  # (t) bool, ordinary text that may be hidden; False for special and visual tokens
    )
    image_mask: Tensor  # (t) bool, visual tokens
    segment_lengths: tuple[int, int, int]  # context, eos, target
    patches: Tensor  # (p, B) uint8, one frame
    grids: Tensor  # (i, 3) int64, temporal x height x width in patches
    key: int  # identity of the content: equal items share it
    seed: int  # all randomness about this sample follows from it
    row_id: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples packed end to end.

    `segment_lengths`, `grids` and `images_per_sample` are bookkeeping for the host and stay on the
    CPU; the rest moves with `.to`.
    """

    input_ids: Tensor  # (T) int64
    position_ids: Tensor  # (3, T) int64
    text_mask: Tensor  # (T) bool
    image_mask: Tensor  # (T) bool
    patches: Tensor  # (P, B) uint8
    keys: Tensor  # (S) int64
    seeds: Tensor  # (S) int64
    segment_lengths: Tensor  # (S, 3) int64, CPU
    grids: Tensor  # (I, 3) int64, CPU
    images_per_sample: Tensor  # (S) int64, CPU
    row_ids: tuple[str, ...]
    num_fillers: int = 0  # of the last samples: they keep ranks in step and are in no loss

    @property
    def num_samples(self) -> int:
        return len(self.row_ids)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample: (S) int64, CPU."""
        return self.segment_lengths.sum(1)

    @property
    def costs(self) -> Tensor:
        """What samples cost, in text tokens: (S) int64, CPU."""
        before = torch.nn.functional.pad(self.image_mask.long().cumsum(0), (1, 0))
        ends = self.lengths.cumsum(0)
        visual = before[ends] - before[ends - self.lengths]
        return self.lengths + VISUAL_TOKEN_COST * visual

    @property
    def eos_positions(self) -> Tensor:
        """Where each sample's EOS lies in the row: (S) int64, CPU."""
        ends = self.lengths.cumsum(0)
        return ends - self.segment_lengths[:, 2] - 1

    @property
    def num_real_tokens(self) -> int:
        """Tokens before the fillers."""
        return int(self.lengths[: self.num_samples - self.num_fillers].sum())

    @property
    def patches_per_sample(self) -> Tensor:
        """(S) int64, CPU."""
        image = torch.repeat_interleave(torch.arange(self.num_samples), self.images_per_sample)
        return torch.zeros(self.num_samples, dtype=torch.int64).index_add(
            0, image, self.grids.prod(1)
        )

    def to(self, device: torch.device | str) -> Batch:
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in _DEVICE_FIELDS}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        return replace(self, **{n: getattr(self, n).pin_memory() for n in _DEVICE_FIELDS})

    def select(self, start: int, stop: int) -> Batch:
        """Samples start..stop as a batch of their own; views, no copy."""
        tokens = _span(self.lengths, start, stop)
        patches = _span(self.patches_per_sample, start, stop)
        images = _span(self.images_per_sample, start, stop)
        return Batch(
            input_ids=self.input_ids[tokens],
            position_ids=self.position_ids[:, tokens],
            text_mask=self.text_mask[tokens],
            image_mask=self.image_mask[tokens],
            patches=self.patches[patches],
            keys=self.keys[start:stop],
            seeds=self.seeds[start:stop],
            segment_lengths=self.segment_lengths[start:stop],
            grids=self.grids[images],
            images_per_sample=self.images_per_sample[start:stop],
            row_ids=self.row_ids[start:stop],
        )

    def take(self, samples: Tensor) -> Batch:
        """Chosen samples in a chosen order: (N) int64 -> a batch of N; copies."""
        tokens = rows_of(samples, self.lengths)
        patches = rows_of(samples, self.patches_per_sample)
        images = rows_of(samples, self.images_per_sample)
        return Batch(
            input_ids=self.input_ids[tokens],
            position_ids=self.position_ids[:, tokens],
            text_mask=self.text_mask[tokens],
            image_mask=self.image_mask[tokens],
            patches=self.patches[patches],
            keys=self.keys[samples],
            seeds=self.seeds[samples],
            segment_lengths=self.segment_lengths[samples],
            grids=self.grids[images],
            images_per_sample=self.images_per_sample[samples],
            row_ids=tuple(self.row_ids[sample] for sample in samples.tolist()),
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """What a collator makes of N dataset rows: packed samples, role by role, on the host.

    Generative stages have one sample a row. In contrast the samples are N queries, N positives,
    then hard negatives.
    """

    batch: Batch
    num_rows: int
    skipped: tuple[str, ...]  # why rows are missing, where the config allows it


def cut_by_cost(tokens: Tensor, costs: Tensor, token_budget: int) -> list[Tensor]:
    """Samples of about equal cost together, the dearest first, in pieces of at most `token_budget`
    tokens (a longer single sample is a piece alone).

    Then texts do not wait for images, pieces are full, and attention pads little where it pads.
    Samples of equal cost keep their order.

    Args:
        tokens, costs: (S), of each sample.

    Returns:
        For each piece the samples in it, int64; together each sample once.
    """
    order = costs.argsort(descending=True, stable=True)
    sizes, used = [0], 0
    for length in tokens[order].tolist():
        if sizes[-1] and used + length > token_budget:
            sizes.append(0)
            used = 0
        sizes[-1] += 1
        used += length
    return list(order.split(sizes))


_DEVICE_FIELDS = tuple(f.name for f in fields(Batch))[:7]
_NUM_TENSORS = 10


def pack(samples: Sequence[Encoded]) -> Batch:
    """Lay samples end to end; their order is kept."""
    return Batch(
        input_ids=torch.cat([s.input_ids for s in samples]),
        position_ids=torch.cat([s.position_ids for s in samples], dim=1),
        text_mask=torch.cat([s.text_mask for s in samples]),
        image_mask=torch.cat([s.image_mask for s in samples]),
        patches=torch.cat([s.patches for s in samples]),
        keys=torch.tensor([s.key for s in samples]),
        seeds=torch.tensor([s.seed for s in samples]),
        segment_lengths=torch.tensor([s.segment_lengths for s in samples]),
        grids=torch.cat([s.grids for s in samples]),
        images_per_sample=torch.tensor([len(s.grids) for s in samples]),
        row_ids=tuple(s.row_id for s in samples),
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Batches end to end as one; only the last may have fillers."""
    assert not any(batch.num_fillers for batch in batches[:-1])
    joined: dict[str, Any] = {
        f.name: torch.cat([getattr(b, f.name) for b in batches], dim=int(f.name == "position_ids"))
        for f in fields(Batch)[:_NUM_TENSORS]
    }
    row_ids = tuple(row_id for batch in batches for row_id in batch.row_ids)
    return Batch(**joined, row_ids=row_ids, num_fillers=batches[-1].num_fillers)


def rows_of(pieces: Tensor, sizes: Tensor) -> Tensor:
    """Rows of chosen pieces, of all that lie end to end with these sizes."""
    return ranges((sizes.cumsum(0) - sizes)[pieces], sizes[pieces])


def _span(sizes: Tensor, start: int, stop: int) -> slice:
    return slice(int(sizes[:start].sum()), int(sizes[:stop].sum()))
