"""Losses and gradients of one training step, as CoCoA and VLM2Vec train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.peers.grad_cache import cached_step
from benchmarks.peers.inputs import IGNORED, Inputs, Row, padded
from benchmarks.peers.model import PeerModel, PixelDecoder, Seen

CHUNK = 8  # rows of a gradient-cache chunk in the released scripts

Collate = Callable[[Sequence[Row]], Inputs]


def collator(*, image_processor: Any, pad_id: int, device: torch.device) -> Collate:
    """`padded`, with what does not change bound."""
    return partial(padded, image_processor=image_processor, pad_id=pad_id, device=device)


def text_loss(seen: Seen, labels: Tensor) -> Tensor:
    """Cross-entropy of hidden tokens: logits of all positions to float32, shifted copies, the mean
    over what is not ignored (CoCoA's modeling_qwen2_vl.py).
    """
    logits = seen.logits.float()
    shifted = logits[:, :-1].contiguous().flatten(0, 1)
    return cross_entropy(shifted, labels[:, 1:].contiguous().flatten(), ignore_index=IGNORED)


def reconstruct_step(model: PeerModel, rows: Sequence[Row], *, collate: Collate) -> Tensor:
    """The bridge stage on one micro-batch: images are processed in the step. Adds gradients."""
    inputs = collate(rows)
    loss = text_loss(model(inputs), inputs.labels)
    loss.backward()
    return loss.detach()


def warmup_step(
    model: PeerModel,
    rows: Sequence[Row],
    *,
    collate: Collate,
    decoder: PixelDecoder,
    weight: float,
    clean: Sequence[Tensor],
) -> Tensor:
    """The warm-up stage on one micro-batch: text, and pixels of hidden visual tokens.

    Args:
        decoder: runs on all tokens, and its projection too.
        weight: of the pixel loss.
        clean: of each row with a picture, (v, R) normalised pixels of its hidden visual tokens.
    """
    inputs = collate(rows)
    seen: Seen = model(inputs)
    predicted = model.decode(decoder, seen)
    hidden = torch.stack([_hidden_tokens(row, predicted.shape[1]) for row in rows])
    chosen = predicted[hidden.nonzero(as_tuple=True)].float()
    pixel_loss = mse_loss(chosen, torch.cat(list(clean)).to(predicted.device).float())
    loss = text_loss(seen, inputs.labels) + weight * pixel_loss
    loss.backward()
    return loss.detach()


def contrast_step(
    model: PeerModel,
    queries: Sequence[Row],
    positives: Sequence[Row],
    *,
    collate: Collate,
    temperature: float,
    pad_whole_batch: bool,
) -> Tensor:
    """The contrastive stage on one device's batch, images processed in the step. Adds gradients.

    Args:
        pad_whole_batch: pad all rows of a tower to their longest before cutting, as VLM2Vec-V2
            does; False for CoCoA, which pads every chunk by itself.
    """
    if pad_whole_batch:
        chunks = [collate(tower).split(CHUNK) for tower in (queries, positives)]
    else:
        chunks = [[collate(part) for part in in_chunks(tower)] for tower in (queries, positives)]
    return cached_step(model.embed, *chunks, temperature=temperature)


def in_chunks(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """`CHUNK` rows each, whatever their lengths."""
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def _hidden_tokens(row: Row, slots: int) -> Tensor:
    """(slots) bool: visual tokens whose patches are hidden."""
    found = torch.zeros(slots, dtype=torch.bool)
    if row.hidden_patches is not None:
        visual = row.image_mask.nonzero()[:, 0]
        per_token = row.hidden_patches.view(len(visual), -1).all(1)
        found[visual[per_token]] = True
    return found
