"""Losses of all stages, as pure functions.

Every loss is returned one value per token, patch or query. The caller sums them and divides by the
count over the whole global batch, so a mean is the same whatever the packing, the accumulation or
the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.utils.checkpoint import checkpoint


def masked_next_token(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of hidden tokens (MNTP): the state at position i-1 predicts the hidden token at
    position i (LLM2Vec, arXiv 2404.05961).

    Args:
        logits: (M, V), of the predicting states alone.
        targets: (M) int64, the hidden tokens.

    Returns:
        Losses (M) in float32 (float64 for float64), and whether the best guess was right (M) bool.
    """
    logits = _widened(logits)
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets


def rebuilt_patches(predicted: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of each hidden visual token's pixels: (N, B), (N, B) -> (N) float32."""
    return mse_loss(predicted.float(), pixels.float(), reduction="none").mean(1)


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    scale: Tensor,
    *,
    keys: tuple[Tensor, Tensor, Tensor] | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each query's positive among all candidates (InfoNCE, arXiv 1807.03748).

    Args:
        queries: (N, D) unit rows.
        candidates: (M, D) unit rows; positives and hard negatives of the whole global batch.
        positive_index: (N) int64, each query's positive among the candidates.
        scale: () inverse temperature.
        keys: content keys by which `same_content` finds false negatives: of the queries (N), of the
            candidates (M), and of the query that each candidate belongs to (M); None masks nothing.
        block: queries whose similarities, (block, M), are in memory together. With more queries
            than that, each block is computed again in the backward pass.

    Returns:
        Losses (N) in float32 (float64 for float64), whether the positive is the nearest of all that
        are no false negatives (N) bool, and whether there is any other (N) bool: a query without a
        negative has a loss of 0 and is no hit.
    """

    def some(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        index = positive_index[rows]
        with torch.autocast(queries.device.type, enabled=False):
            similarity = _widened(queries[rows]) @ _widened(candidates).T
        logits, similarity = similarity * scale, similarity.detach()
        if keys is not None:
            ignored = same_content(index, keys[0][rows], keys[1], keys[2])
            # Behind the product: 0 * -inf would be the temperature's gradient.
            logits = logits.masked_fill(ignored, -torch.inf)
            similarity = similarity.masked_fill(ignored, -torch.inf)
        losses = cross_entropy(logits, index, reduction="none")
        compared = (~similarity.isneginf()).sum(1) > 1  # its own positive is always seen
        return losses, (similarity.argmax(1) == index) & compared, compared

    if len(queries) <= block:
        return some(slice(None))
    found = []
    for start in range(0, len(queries), block):
        found.append(checkpoint(some, slice(start, start + block), use_reentrant=False))
    losses, hits, compared = (torch.cat(part) for part in zip(*found, strict=True))
    return losses, hits, compared


def same_content(
    positive_index: Tensor,
    query_keys: Tensor,
    candidate_keys: Tensor,
    candidate_query_keys: Tensor,
) -> Tensor:
    """Candidates that only look like negatives: an identical target, or the target of an identical
    query.

    Args:
        query_keys: (N) int64.
        candidate_keys: (M) int64.
        candidate_query_keys: (M) int64, the key of the query a positive belongs to; -1 for hard
            negatives.

    Returns:
        (N, M) bool, False at each query's own positive.
    """
    same_target = candidate_keys[positive_index][:, None] == candidate_keys[None, :]
    same_query = query_keys[:, None] == candidate_query_keys[None, :]
    return (same_target | same_query).scatter(1, positive_index[:, None], False)


def matryoshka(embeddings: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """The leading dimensions of unit vectors, each made unit again (arXiv 2205.13147).

    Args:
        embeddings: (N, D) unit rows.

    Returns:
        (N, d) for each d of `dims`.
    """
    return [normalize(embeddings[:, :dim], dim=-1) for dim in dims]


def _widened(states: Tensor) -> Tensor:
    """In the type that losses are computed in: float32, or float64 for float64."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
