"""Hidden states or embeddings in, sums of losses with their counts out; pure functions.

Every loss is returned as a *sum*. The caller divides by the count over the whole global batch, so a
mean over masked tokens is the same whatever the packing, the accumulation or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize

from cocoa_pl.similarity_tiles import TiledInfoNCE, TileKeys, Tiles, similarities


def masked_next_token(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """MNTP: the state at position i-1 predicts the hidden token at position i (LLM2Vec, arXiv
    2404.05961).

    The vocabulary head has run on these states and on no others.

    Args:
        logits: (M, V).
        targets: (M) int64, the uncorrupted tokens.

    Returns:
        Cross-entropies (M) in float32 (float64 for float64) and whether the best guess was right
        (M) bool.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(wide, targets, reduction="none"), wide.argmax(1) == targets


def rebuilt_patches(predicted: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of each hidden visual token's pixels: (V, B), (V, B) -> (V)."""
    return mse_loss(predicted.float(), pixels.float(), reduction="none").mean(1)


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    scale: Tensor,
    *,
    false_negatives: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's positive among all candidates (InfoNCE, arXiv 1807.03748).

    Args:
        queries: (N, D) unit rows.
        candidates: (M, D) unit rows; positives and hard negatives of the whole global batch.
        positive_index: (N) int64, each query's positive among the candidates.
        scale: () inverse temperature.
        false_negatives: (N, M) bool, True = neither positive nor negative; the positive itself must
            be False.

    Returns:
        Losses (N) and similarities before scaling (N, M), both float32 (float64 for float64).
    """
    similarity = similarities(queries, candidates)
    logits = similarity * scale
    if false_negatives is not None:
        logits = logits.masked_fill(false_negatives, -torch.inf)
    return cross_entropy(logits, positive_index, reduction="none"), similarity


@dataclass(frozen=True)
class ContentKeys:
    """What tells false negatives of N queries among M candidates: see `same_content`."""

    queries: Tensor  # (N) int64
    candidates: Tensor  # (M) int64
    partners: Tensor  # (M) int64, the key of the query a candidate belongs to; -1 for none


def info_nce_by_blocks(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    scale: Tensor,
    *,
    keys: ContentKeys | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`info_nce`, a tile of similarities at a time.

    Beside the embeddings and a few numbers a row, the working memory is that of some tiles of
    block x block, however many queries and candidates there are: see `similarity_tiles`. Where all
    fits into one tile, nothing is computed twice.

    Args:
        queries, candidates, positive_index, scale: as for `info_nce`.
        keys: who is a false negative of whom; None to mask nothing.
        block: the side of a tile: queries and candidates whose similarities are in memory together.

    Returns:
        Losses (N) in float32 (float64 for float64), whether the positive is nearest of all that are
        no false negatives (N) bool, and whether there is any other (N) bool: a query without a
        negative has a loss of 0 and is no hit.
    """
    if max(len(queries), len(candidates)) > block:
        wanted = None
        if keys is not None:
            targets = keys.candidates[positive_index]
            wanted = TileKeys(keys.queries, targets, keys.partners, keys.candidates)
        tiles = Tiles(queries, candidates, positive_index, wanted, block)
        found: tuple[Tensor, Tensor, Tensor] = TiledInfoNCE.apply(queries, candidates, scale, tiles)
        return found
    masked = None
    if keys is not None:
        masked = same_content(positive_index, keys.queries, keys.candidates, keys.partners)
    losses, similarity = info_nce(
        queries, candidates, positive_index, scale, false_negatives=masked
    )
    seen = similarity.detach()
    if masked is not None:
        seen = seen.masked_fill(masked, -torch.inf)
    compared = (~seen.isneginf()).sum(1) > 1  # its own positive is always seen
    return losses, (seen.argmax(1) == positive_index) & compared, compared


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
    """The leading dimensions of unit vectors, each made unit again (arXiv 2205.13147)."""
    return [normalize(embeddings[:, :dim], dim=-1) for dim in dims]
