"""Attention of padded states under dense masks, as peers compute it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def additive_mask(
    table: Tensor,
    segment_lengths: Tensor,
    *,
    slots: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Zero where a token sees another, the type's lowest number elsewhere: (B, 1, N, N). Nobody
    sees padding, which sees everything.

    In the manner of CoCoA's modeling_qwen2_vl.py: a 0/1 matrix for each sample of a padded batch in
    float32, filled block by block, then inverted and scaled.

    Args:
        table: (3, 3) bool, rows attend to columns.
        segment_lengths: (B, 3) int64.
        slots: N, tokens of a row with its padding.
    """
    seen = torch.zeros(len(segment_lengths), slots, slots, device=device)
    for sample, lengths in enumerate(segment_lengths.tolist()):
        bounds = [0, lengths[0], sum(lengths[:2]), sum(lengths)]
        for row, (top, bottom) in enumerate(pairwise(bounds)):
            for column, (left, right) in enumerate(pairwise(bounds)):
                if table[row, column]:
                    seen[sample, top:bottom, left:right] = 1.0
        # A row that sees nothing is NaN on a GPU (https://github.com/pytorch/pytorch/issues/110213).
        seen[sample, sum(lengths) :] = 1.0
    return ((1.0 - seen) * torch.finfo(dtype).min)[:, None].to(dtype)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, scale: float
) -> Tensor:
    """SDPA under a 4-D mask with key-value heads repeated for every query head, as CoCoA and MoCa
    do it: (B, H, N, D), (B, H_kv, N, D) twice -> (B, H, N, D).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (repeated(states, groups) for states in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def repeated(states: Tensor, groups: int) -> Tensor:
    """(B, H_kv, N, D) -> (B, H_kv * groups, N, D), each head `groups` times in a row."""
    return states.repeat_interleave(groups, dim=1)


def vision_attention(
    query: Tensor, key: Tensor, value: Tensor, *, cumulative: Tensor, fold_batch: bool
) -> Tensor:
    """All images of a batch in one product under a dense mask: (P, H, D) each -> (P, H, D).

    Args:
        cumulative: (I + 1) int, where each image's patches begin.
        fold_batch: heads as the batch of a 3-D call, as in CoCoA's copy of the vision tower and in
            earlier transformers; False for a batch of one, as in transformers 4.52's
            `VisionSdpaAttention`.
    """
    patches = len(query)
    mask = torch.zeros(1, patches, patches, device=query.device, dtype=torch.bool)
    for start, stop in pairwise(cumulative.tolist()):
        mask[..., start:stop, start:stop] = True
    q, k, v = (states.transpose(0, 1) for states in (query, key, value))  # (H, P, D)
    if fold_batch:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    output = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)
    return output[0].transpose(0, 1)
