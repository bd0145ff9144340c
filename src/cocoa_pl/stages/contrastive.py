"""The contrastive stage: InfoNCE between the embeddings of queries and positives of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cocoa_pl.attention.plan import on_device
from cocoa_pl.config.bounds import Count, Positive
from cocoa_pl.data.batch import Batch
from cocoa_pl.distributed.collectives import exchange_counts, gather_rows, global_sum, rank
from cocoa_pl.errors import UserError
from cocoa_pl.grad_cache import GradientCache
from cocoa_pl.losses import info_nce, matryoshka
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import shared_norms
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.callbacks import heat_map

Keys = tuple[Tensor, Tensor, Tensor]  # of queries, candidates, candidates' queries

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


class PoolPrecision(Metric):
    """Precision@1 of held-out rows, each among the positives of its own subset: the mean over
    subsets, exact over ranks. Candidates of identical content, or of an identical query, are right
    answers too (`losses.same_content`). For `block` see `losses.info_nce`.
    """

    columns = ("queries", "positives", "query_keys", "positive_keys", "pools")

    def __init__(self, *, block: int) -> None:
        super().__init__()
        self.block = block
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, *rows: Tensor) -> None:
        """Keep unit vectors (n, D) of queries and of positives, their content keys (n), and a
        number for each row's subset (n).
        """
        for name, some in zip(self.columns, rows, strict=True):
            getattr(self, name).append(some)

    def compute(self) -> Tensor:
        """() A share; NaN if no query had a wrong answer to choose from."""
        *rows, pools = (dim_zero_cat(getattr(self, name)) for name in self.columns)
        found = []
        for pool in pools.unique():
            queries, positives, query_keys, positive_keys = (one[pools == pool] for one in rows)
            _, hits, compared = info_nce(
                queries,
                positives,
                torch.arange(len(queries), device=queries.device),
                queries.new_ones(()),
                keys=(query_keys, positive_keys, query_keys),
                block=self.block,
            )
            if compared.any():
                found.append(hits.sum() / compared.sum())
        return torch.stack(found).mean() if found else torch.tensor(torch.nan)


class ContrastiveModule(StageModule):
    """Gradient-cached InfoNCE with the positives and hard negatives of all ranks as candidates.

    Args:
        temperature: of the softmax; the starting value if it is learnt.
        learn_temperature: train it, with exp parametrisation.
        symmetric: add the loss of positives that look for their queries.
        mask_false_negatives: candidates of identical content (or of an identical query) are no
            negatives.
        matryoshka_dims: also train these leading dimensions; empty for the full vector only.
        similarity_block: the block of `losses.info_nce`; it changes no value.
    """

    measures = ("loss", "accuracy", "with_negatives", "precision_at_1")
    empty = (
        "no query had a negative; raise the batch size, or give rows whose queries and positives "
        "differ, or hard negatives"
    )

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
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        self.temperature = Temperature(temperature, learn=learn_temperature)
        self.symmetric = symmetric
        self.mask_false_negatives = mask_false_negatives
        self.dims = (*matryoshka_dims, backbone.hidden_size)
        if max(self.dims) > backbone.hidden_size:
            raise UserError(
                f"matryoshka_dims={list(matryoshka_dims)} exceed the embedding's "
                f"{backbone.hidden_size} dimensions"
            )
        self.similarity_block = similarity_block
        self.precision = PoolPrecision(block=similarity_block)

    def accumulate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """`targets` counts queries that have a negative."""
        num_queries, num_candidates = self._counts(batches)
        with shared_norms(self.backbone):
            cache = GradientCache(self._embed, self.aligned(batches))
            queries, others, keys, _ = self._sides(cache.embeddings, batches)
            n, scale = len(queries), self.temperature()
            losses, hits, compared = self._losses(
                queries, others, keys, num_candidates, scale, self.dims
            )
            if self.symmetric:
                positive_keys = keys[1][:n]
                keys = (positive_keys, keys[0], positive_keys)
                reverse, *_ = self._losses(others[:n], queries, keys, num_queries, scale, self.dims)
                losses = (losses + reverse) / 2
            loss = losses.sum() / len(self.dims) / sum(num_queries)
            self.manual_backward(loss)
            cache.backward(self.manual_backward)
        total, found, targets = global_sum(torch.stack([loss.detach(), hits.sum(), compared.sum()]))
        return {
            "loss": total,
            "accuracy": found / targets,
            "temperature": 1 / scale.detach(),
            "targets": targets,
        }

    def measure(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Among the positives and hard negatives of all ranks at the full width, as in training;
        and, once all rows are seen, among the positives of each row's subset.
        """
        _, num_candidates = self._counts(batches)
        queries, others, keys, pools = self._sides(self._embeddings(batches), batches)
        n = len(queries)
        pools = on_device(pools, self.device)
        self.precision.update(queries, others[:n], keys[0], keys[1][:n], pools)
        losses, hits, compared = self._losses(
            queries, others, keys, num_candidates, self.temperature(), self.dims[-1:]
        )
        return {
            "rows": torch.full((), n, device=self.device),
            "loss": losses.sum(),
            "hits": hits.sum(),
            "compared": compared.sum(),
        }

    def _embed(self, batch: Batch) -> Tensor:
        return self.backbone.embed(batch.to(self.device))

    def _embeddings(self, batches: Sequence[Batch]) -> Tensor:
        return torch.cat([self._embed(batch) for batch in self.aligned(batches)])

    def _counts(self, batches: Sequence[Batch]) -> list[list[int]]:
        """Queries and candidates of every rank."""
        queries = sum(batch.num_rows for batch in batches)
        samples = sum(batch.num_samples for batch in batches)
        return exchange_counts([queries, samples - queries], self.device)

    def _sides(
        self, embeddings: Tensor, batches: Sequence[Batch]
    ) -> tuple[Tensor, Tensor, Keys, Tensor]:
        """Embeddings of this rank's n queries, and of their positives and all hard negatives, in
        the order of the rows; the content keys of both; and on the host the queries' pools.
        """
        order = torch.cat([batch.places for batch in batches]).argsort()
        pools = torch.cat([batch.pools for batch in batches])[order]
        keys = on_device(torch.cat([batch.keys for batch in batches])[order], self.device)
        embeddings = embeddings.index_select(0, on_device(order, self.device))
        n = sum(batch.num_rows for batch in batches)
        partners = torch.full_like(keys[n:], -1)  # hard negatives belong to no query
        partners[:n] = keys[:n]
        return embeddings[:n], embeddings[n:], (keys[:n], keys[n:], partners), pools[:n]

    def _losses(
        self,
        queries: Tensor,
        own_candidates: Tensor,
        keys: Keys,
        counts: Sequence[int],
        scale: Tensor,
        dims: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """InfoNCE of this rank's queries among the candidates of all ranks, of which query i's
        positive is candidate i of this rank.

        Args:
            keys: as for `info_nce`, of this rank's candidates.
            counts: candidates of every rank.
            dims: Matryoshka widths; the last is the full one.

        Returns:
            Losses (n) summed over widths, hits (n) and who has a negative (n) at the last width.
        """
        candidates = gather_rows(own_candidates, counts)
        all_keys = None
        if self.mask_false_negatives:
            all_keys = (keys[0], gather_rows(keys[1], counts), gather_rows(keys[2], counts))
        index = sum(counts[: rank()]) + torch.arange(len(queries), device=queries.device)
        losses = torch.zeros_like(queries[:, 0])
        widths = zip(matryoshka(queries, dims), matryoshka(candidates, dims), strict=True)
        for some_queries, some_candidates in widths:
            value, hits, compared = info_nce(
                some_queries,
                some_candidates,
                index,
                scale,
                keys=all_keys,
                block=self.similarity_block,
            )
            losses = losses + value
        return losses, hits, compared

    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"loss": sums["loss"] / sums["rows"]}
        if sums["compared"]:
            found["accuracy"] = sums["hits"] / sums["compared"]
        if sums["compared"] < sums["rows"]:
            found["with_negatives"] = sums["compared"] / sums["rows"]
        return found | {"precision_at_1": self.precision.compute()}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.precision.reset()

    def summary_line(self, metrics: dict[str, float]) -> str:
        line = f"validation: loss {metrics['loss']:.3f}, "
        if "accuracy" not in metrics:
            return line + "and no query had a negative, so that says nothing"
        line += f"in-batch precision@1 {metrics['accuracy']:.1%}"
        if "with_negatives" in metrics:
            line += f" of the {metrics['with_negatives']:.1%} of queries that had a negative"
        if metrics["precision_at_1"] >= 0:
            line += f", {metrics['precision_at_1']:.1%} among all held-out rows of a subset"
        return line

    def pictures(self, batches: Sequence[Batch]) -> dict[str, Any]:
        queries, others, *_ = self._sides(self._embeddings(batches), batches)
        return {"similarity": heat_map(queries @ others[: len(queries)].T)}
