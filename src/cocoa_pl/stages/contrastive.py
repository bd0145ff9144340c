"""Pairs in, unit embeddings of queries and positives, and the InfoNCE loss between them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cocoa_pl.batch import Rows
from cocoa_pl.distributed import gather_offset, gather_rows, global_sum
from cocoa_pl.grad_cache import cached_backward
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.objectives import info_nce, matryoshka, same_content
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.pictures import heat_map

# CLIP's bound on a learnt inverse temperature (arXiv 2103.00020, section 2.5).
MAX_SCALE = 100.0


class ContrastiveModule(StageModule):
    """Gradient-cached InfoNCE with the positives and hard negatives of all ranks as candidates.

    Args:
        temperature: of the softmax; the starting value if it is learnt.
        learn_temperature: train it, with exp parametrisation.
        symmetric: add the loss of positives that look for their queries.
        mask_false_negatives: candidates of identical content (or of an identical query) are no
            negatives.
        matryoshka_dims: also train these leading dimensions; empty for the full vector only.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        temperature: float,
        learn_temperature: bool,
        symmetric: bool,
        mask_false_negatives: bool,
        matryoshka_dims: Sequence[int],
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        self.log_scale = nn.Parameter(
            torch.tensor(math.log(1 / temperature)), requires_grad=learn_temperature
        )
        self.symmetric = symmetric
        self.mask_false_negatives = mask_false_negatives
        self.dims = (*matryoshka_dims, backbone.hidden_size)
        if max(self.dims) > backbone.hidden_size:
            raise ValueError(
                f"matryoshka dims {self.dims} exceed the embedding's {backbone.hidden_size}"
            )

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def accumulate(self, rows: Rows) -> dict[str, Tensor]:
        hits = torch.zeros((), device=self.device)

        def loss(embeddings: Tensor) -> Tensor:
            value, found = self.loss(embeddings, rows)
            hits.copy_(found)
            return value

        value = cached_backward(
            lambda chunk: self.backbone.embed(chunk, self.policy),
            self.chunks(rows.batch),
            loss,
            backward=self.manual_backward,
        )
        total, accuracy = global_sum(torch.stack([value, hits]))
        metrics = {"loss": total, "accuracy": accuracy, "temperature": 1 / self.scale.detach()}
        return metrics

    def loss(self, embeddings: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """This rank's share of the loss over the global batch, and of the share of hits at the full
        width.

        Args:
            embeddings: (S, D), queries, positives, negatives of this rank.
        """
        n = rows.num_rows
        keys = rows.batch.keys
        count = global_sum(torch.tensor(float(n), device=embeddings.device))
        offset = gather_offset(len(embeddings) - n, embeddings.device)
        index = offset + torch.arange(n, device=embeddings.device)
        own_query_keys = torch.full_like(keys[n:], -1)
        own_query_keys[:n] = keys[:n]
        candidate_keys, query_of_candidate = gather_rows(keys[n:]), gather_rows(own_query_keys)
        queries, candidates = embeddings[:n], gather_rows(embeddings[n:])
        masked = self._masked(index, keys[:n], candidate_keys, query_of_candidate)

        losses, similarity = torch.zeros(n, device=embeddings.device), None
        for q, c in zip(
            matryoshka(queries, self.dims), matryoshka(candidates, self.dims), strict=True
        ):
            value, similarity = info_nce(q, c, index, self.scale, false_negatives=masked)
            losses = losses + value
        assert similarity is not None
        if self.symmetric:
            losses = (losses + self._reverse(embeddings, keys, n)) / 2
        seen = similarity if masked is None else similarity.masked_fill(masked, -torch.inf)
        hits = (seen.argmax(1) == index).sum()
        return losses.sum() / len(self.dims) / count, hits / count

    def _reverse(self, embeddings: Tensor, keys: Tensor, n: int) -> Tensor:
        offset = gather_offset(n, embeddings.device)
        index = offset + torch.arange(n, device=embeddings.device)
        query_keys, positive_keys = gather_rows(keys[:n]), gather_rows(keys[n : 2 * n])
        masked = self._masked(index, keys[n : 2 * n], query_keys, positive_keys)
        queries = gather_rows(embeddings[:n])
        losses = torch.zeros(n, device=embeddings.device)
        for p, q in zip(
            matryoshka(embeddings[n : 2 * n], self.dims),
            matryoshka(queries, self.dims),
            strict=True,
        ):
            losses = losses + info_nce(p, q, index, self.scale, false_negatives=masked)[0]
        return losses

    def _masked(
        self, index: Tensor, keys: Tensor, candidate_keys: Tensor, partner_keys: Tensor
    ) -> Tensor | None:
        if not self.mask_false_negatives:
            return None
        return same_content(index, keys, candidate_keys, partner_keys)

    def measure(self, rows: Rows) -> dict[str, Tensor]:
        """Validation is local to a rank's batch: loss and precision among its own candidates."""
        n = rows.num_rows
        embeddings = self.backbone.embed(rows.batch, self.policy)
        keys, index = rows.batch.keys, torch.arange(n, device=embeddings.device)
        partner = torch.full_like(keys[n:], -1)
        partner[:n] = keys[:n]
        masked = self._masked(index, keys[:n], keys[n:], partner)
        losses, similarity = info_nce(
            embeddings[:n], embeddings[n:], index, self.scale, false_negatives=masked
        )
        seen = similarity if masked is None else similarity.masked_fill(masked, -torch.inf)
        hits = (seen.argmax(1) == index).sum()
        return {"rows": torch.tensor(n, device=self.device), "loss": losses.sum(), "hits": hits}

    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": sums["loss"] / sums["rows"], "accuracy": sums["hits"] / sums["rows"]}

    def hand_over(self, metrics: dict[str, float]) -> str:
        return (
            f"validation: loss {metrics['loss']:.3f}, "
            f"in-batch precision@1 {metrics['accuracy']:.1%}"
        )

    def illustrate(self, rows: Rows) -> dict[str, Any]:
        embeddings = self.backbone.embed(rows.batch, self.policy)
        n = rows.num_rows
        return {"similarity": heat_map(embeddings[:n] @ embeddings[n : 2 * n].T)}
