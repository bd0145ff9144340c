"""Pairs in, unit embeddings of queries and positives, and the InfoNCE loss between them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cocoa_pl.attention.plan import on_device
from cocoa_pl.config.bounds import Count, NotNegative, Positive
from cocoa_pl.distributed.collectives import RowCounts, gather_offset, gather_rows, global_sum
from cocoa_pl.errors import UserError
from cocoa_pl.grad_cache import cached_backward
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import shared_norms
from cocoa_pl.objectives import ContentKeys, info_nce_by_blocks, matryoshka
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.chunks import Chunk, Step, ToEmbed
from cocoa_pl.stages.pictures import heat_map

# CLIP's bound on a learnt inverse temperature (arXiv 2103.00020, section 2.5).
MAX_SCALE = 100.0


class Temperature(nn.Module):
    """The inverse temperature of the softmax, as exp of a parameter.

    Args:
        temperature: where it starts.
        learn: whether it trains; CLIP's bound holds then.

    Raises:
        UserError: for a start beyond the bound, from where it could never move.
    """

    def __init__(self, temperature: float, *, learn: bool) -> None:
        super().__init__()
        if learn and temperature * MAX_SCALE < 1:
            raise UserError(
                f"temperature={temperature:g} is below {1 / MAX_SCALE:g}, the bound of a learnt "
                "one; start higher, or set learn_temperature=false"
            )
        start = torch.tensor([math.log(1 / temperature)])  # FSDP2 splits no scalars
        self.log_scale = nn.Parameter(start, requires_grad=learn)

    def forward(self) -> Tensor:
        log_scale = self.log_scale[0]
        if self.log_scale.requires_grad:
            # The bound stops the value and not the gradient, which could not lead back then.
            bounded = log_scale.clamp(max=math.log(MAX_SCALE))
            log_scale = log_scale + (bounded - log_scale).detach()
        return log_scale.exp()


@dataclass(frozen=True)
class Candidates:
    """Queries of this rank and what they choose from: the candidates of all ranks.

    Attributes:
        queries: (n, D) unit rows.
        candidates: (M, D) unit rows.
        index: (n) int64, each query's positive among the candidates.
        keys: what tells false negatives; None to mask nothing.
    """

    queries: Tensor
    candidates: Tensor
    index: Tensor
    keys: ContentKeys | None


class ContrastiveModule(StageModule[Chunk]):
    """Gradient-cached InfoNCE with the positives and hard negatives of all ranks as candidates.

    Args:
        temperature: of the softmax; the starting value if it is learnt.
        learn_temperature: train it, with exp parametrisation.
        symmetric: add the loss of positives that look for their queries.
        mask_false_negatives: candidates of identical content (or of an identical query) are no
            negatives.
        matryoshka_dims: also train these leading dimensions; empty for the full vector only.
        similarity_block: side of a tile, the queries and candidates whose similarities are in
            memory together; more of them are computed again in the backward pass. It changes no
            value.
        keep_gib: GiB of graphs of gradient-cache chunks that may be in memory together, so that
            these chunks are not embedded twice; one chunk's graph always is. It changes no value.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        temperature: Positive,
        learn_temperature: bool,
        symmetric: bool,
        mask_false_negatives: bool,
        matryoshka_dims: Sequence[Count],
        similarity_block: Count,
        keep_gib: NotNegative,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        self.temperature = Temperature(temperature, learn=learn_temperature)
        self.learn_temperature = learn_temperature
        self.symmetric = symmetric
        self.mask_false_negatives = mask_false_negatives
        self.dims = (*matryoshka_dims, backbone.hidden_size)
        if max(self.dims) > backbone.hidden_size:
            raise UserError(
                f"matryoshka_dims={list(matryoshka_dims)} exceed the embedding's "
                f"{backbone.hidden_size} dimensions"
            )
        self.similarity_block = similarity_block
        self.keep_bytes = int(keep_gib * 2**30)

    @property
    def empty(self) -> str:
        return (
            "no query had a negative to be told from; raise the batch size, or give rows whose "
            "queries and positives differ, or hard negatives"
        )

    @property
    def parts(self) -> list[nn.Module]:
        return [self.backbone, *([self.temperature] if self.learn_temperature else [])]

    def preparation(self, *, validating: bool, device: torch.device | None = None) -> ToEmbed:
        layouts = self.backbone.layouts(self.policy, device)
        return ToEmbed(layouts, token_budget=self.token_budget)

    def accumulate(self, step: Step[Chunk]) -> dict[str, Tensor]:
        """`targets` are queries that have a negative."""
        hits, compared, scale = torch.zeros(3, device=self.device)
        counts = self._counts(step)  # exchanged while chunks are embedded

        def loss(embeddings: Tensor) -> Tensor:
            value, own_hits, own_compared, used_scale = self.loss(embeddings, step, counts)
            hits.copy_(own_hits.sum())
            compared.copy_(own_compared.sum())
            scale.copy_(used_scale.detach())
            return value

        with shared_norms(self.backbone):
            value = cached_backward(
                self._embed_chunk,
                self.in_step(step.chunks),
                loss,
                keep_bytes=self.keep_bytes,
                agreed=self.all_agree,
                backward=self.manual_backward,
                device=self.device,
            )
        total, found, targets = global_sum(torch.stack([value, hits, compared]))
        accuracy = found / targets
        return {"loss": total, "accuracy": accuracy, "temperature": 1 / scale, "targets": targets}

    def loss(
        self, embeddings: Tensor, step: Step[Chunk], counts: RowCounts
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's share of the loss over the global batch, which of its queries (n) are hits at
        the full width, which have a negative at all, and the inverse temperature.

        Args:
            embeddings: (S, D), of the chunks one after the other.
            counts: of all ranks.
        """
        n, keys = step.num_rows, on_device(step.keys, self.device)
        embeddings = self._in_order_of_rows(embeddings, step)
        count = sum(counts["queries"])
        task, scale = self._candidates(embeddings, keys, n, counts), self.temperature()
        losses, hits, compared = self._widths(task, scale)
        if self.symmetric:
            reverse = self._reversed(embeddings, keys, n, counts)
            losses = (losses + self._widths(reverse, scale)[0]) / 2
        return losses.sum() / len(self.dims) / count, hits, compared, scale

    def _embed_chunk(self, chunk: Chunk) -> Tensor:
        here = chunk.to(self.device)
        embeddings: Tensor = self.backbone.embed(here.batch, here.layout)
        return embeddings

    def _embed(self, step: Step[Chunk]) -> Tensor:
        """All samples in the order of the rows: queries, positives, negatives of this rank."""
        found = [self._embed_chunk(chunk) for chunk in self.in_step(step.chunks)]
        return self._in_order_of_rows(torch.cat(found), step)

    def _in_order_of_rows(self, embeddings: Tensor, step: Step[Chunk]) -> Tensor:
        return embeddings.index_select(0, on_device(step.order, self.device))

    def _widths(self, task: Candidates, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (n) summed over the Matryoshka widths, hits (n) at the full one, and which queries
        (n) have a negative.
        """
        losses = torch.zeros_like(task.queries[:, 0])
        hits = compared = torch.empty(0)
        for queries, candidates in zip(
            matryoshka(task.queries, self.dims),
            matryoshka(task.candidates, self.dims),
            strict=True,
        ):
            value, hits, compared = self._info_nce(
                replace(task, queries=queries, candidates=candidates), scale
            )
            losses = losses + value
        return losses, hits, compared

    def _info_nce(self, task: Candidates, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return info_nce_by_blocks(
            task.queries,
            task.candidates,
            task.index,
            scale,
            keys=task.keys,
            block=self.similarity_block,
        )

    def _counts(self, step: Step[Chunk]) -> RowCounts:
        sizes = {"queries": step.num_rows, "candidates": len(step.keys) - step.num_rows}
        return RowCounts(sizes, self.device)

    def _candidates(
        self, embeddings: Tensor, keys: Tensor, n: int, counts: RowCounts
    ) -> Candidates:
        """Queries among the positives and hard negatives of all ranks."""
        own_query_keys = torch.full_like(keys[n:], -1)
        own_query_keys[:n] = keys[:n]
        return self._task(
            embeddings[:n], embeddings[n:], keys[:n], keys[n:], own_query_keys, counts["candidates"]
        )

    def _reversed(self, embeddings: Tensor, keys: Tensor, n: int, counts: RowCounts) -> Candidates:
        """Positives among the queries of all ranks."""
        return self._task(
            embeddings[n : 2 * n],
            embeddings[:n],
            keys[n : 2 * n],
            keys[:n],
            keys[n : 2 * n],
            counts["queries"],
        )

    def _task(
        self,
        queries: Tensor,
        own_candidates: Tensor,
        query_keys: Tensor,
        own_candidate_keys: Tensor,
        own_partner_keys: Tensor,
        counts: Sequence[int],
    ) -> Candidates:
        index = gather_offset(counts) + torch.arange(len(queries), device=queries.device)
        keys = None
        if self.mask_false_negatives:
            keys = ContentKeys(
                query_keys,
                gather_rows(own_candidate_keys, counts),
                gather_rows(own_partner_keys, counts),
            )
        return Candidates(queries, gather_rows(own_candidates, counts), index, keys)

    def measure(self, step: Step[Chunk]) -> dict[str, Tensor]:
        """Among the positives and hard negatives of all ranks, as in training."""
        n, counts = step.num_rows, self._counts(step)
        keys = on_device(step.keys, self.device)
        task = self._candidates(self._embed(step), keys, n, counts)
        losses, hits, compared = self._info_nce(task, self.temperature())
        return {
            "rows": torch.full((), n, device=self.device),
            "loss": losses.sum(),
            "hits": hits.sum(),
            "compared": compared.sum(),
        }

    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"loss": sums["loss"] / sums["rows"]}
        if sums["compared"]:
            found["accuracy"] = sums["hits"] / sums["compared"]
        if sums["compared"] < sums["rows"]:
            found["with_negatives"] = sums["compared"] / sums["rows"]
        return found

    def hand_over(self, metrics: dict[str, float]) -> str:
        told = f"validation: loss {metrics['loss']:.3f}, "
        if "accuracy" not in metrics:
            return told + "and no query had a negative to be told from, so that says nothing"
        told += f"in-batch precision@1 {metrics['accuracy']:.1%}"
        if "with_negatives" in metrics:
            told += f" of the {metrics['with_negatives']:.1%} of queries that had a negative"
        return told

    def illustrate(self, step: Step[Chunk]) -> dict[str, Any]:
        embeddings, n = self._embed(step), step.num_rows
        return {"similarity": heat_map(embeddings[:n] @ embeddings[n : 2 * n].T)}
