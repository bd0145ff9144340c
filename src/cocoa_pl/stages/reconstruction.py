"""Stages that rebuild what was hidden: captioning, warm-up, EOS bridge. Three configs of one
module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cocoa_pl.attention import Plan, make_plan
from cocoa_pl.batch import Batch, Rows
from cocoa_pl.corruption import Corrupted, every_next_token, hide_patches, hide_text
from cocoa_pl.distributed import global_sum
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import shared_norms
from cocoa_pl.models.heads import ImageDecoder, token_pixels
from cocoa_pl.objectives import masked_next_token, rebuilt_patches
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.bridge import exchange_contexts
from cocoa_pl.stages.pictures import MAX_PICTURES, hidden_text, image_triptychs

# A bridge that gains less than this tells target tokens hardly anything about their context.
NO_BRIDGE_GAIN = 0.05  # nats per token


class ReconstructionModule(StageModule):
    """Masked text, and optionally masked patches, predicted from what is left.

    Args:
        text_ratio: share of text tokens hidden; None predicts every next token and hides nothing
            (plain captioning).
        text_segment: the segment whose text is hidden, `context` or `target`.
        patch_ratio: share of visual tokens hidden; 0 leaves out the image decoder.
        patch_weight: of the pixel loss beside the token loss.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        text_ratio: float | None,
        text_segment: str,
        patch_ratio: float,
        patch_weight: float,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        self.text_ratio = text_ratio
        self.text_segment = text_segment
        self.patch_ratio = patch_ratio
        self.patch_weight = patch_weight
        self.image_decoder = (
            ImageDecoder(backbone, patch_values=self.processor.patch_values)
            if patch_ratio
            else None
        )

    def corrupt(self, batch: Batch) -> Corrupted:
        pixels = self.backbone.pixels(batch)
        if self.text_ratio is None:
            seen, token_mask = batch, every_next_token(batch)
        else:
            seen, token_mask = hide_text(
                batch,
                ratio=self.text_ratio,
                segment=self.text_segment,
                mask_token_id=self.processor.mask_id,
            )
        patch_mask, corrupted = torch.zeros_like(token_mask), pixels
        if self.patch_ratio:
            corrupted, patch_mask = hide_patches(
                batch, pixels, ratio=self.patch_ratio, merge_size=self.backbone.merge_size
            )
        real = torch.arange(batch.num_tokens, device=token_mask.device) < batch.num_real_tokens
        return Corrupted(
            seen, batch.input_ids, token_mask & real, patch_mask & real, pixels, corrupted
        )

    @property
    def parts(self) -> list[nn.Module]:
        return [self.backbone, *([self.image_decoder] if self.image_decoder is not None else [])]

    def rebuild(self, seen: Corrupted) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies (M) and hits (M) of hidden tokens, squared errors (V) of hidden visual
        tokens.
        """
        plan = self._plan(seen.batch)
        hidden = self.backbone(seen.batch, plan, seen.corrupted_pixels)
        losses, hits = masked_next_token(
            hidden, seen.token_mask, seen.labels, self.backbone.vocabulary
        )
        errors = losses.new_zeros(0)
        if self.image_decoder is not None:
            predicted = self.image_decoder(self.backbone, hidden, seen.batch, plan, seen.patch_mask)
            errors = rebuilt_patches(predicted, self._targets(seen))
        return losses, hits, errors

    def accumulate(self, rows: Rows) -> dict[str, Tensor]:
        chunks = [self.corrupt(chunk) for chunk in self.chunks(rows.batch)]
        counts = global_sum(
            torch.stack(
                [_count(c.token_mask for c in chunks), _count(c.patch_mask for c in chunks)]
            )
        ).clamp(min=1)
        sums = torch.zeros(3, device=counts.device)
        with shared_norms(self.backbone):
            for chunk in chunks:
                losses, hits, errors = self.rebuild(chunk)
                text, patches = losses.sum() / counts[0], errors.sum() / counts[1]
                self.manual_backward(text + self.patch_weight * patches)
                sums += torch.stack([text, hits.sum() / counts[0], patches]).detach()
        text, accuracy, patches = global_sum(sums)
        metrics = {"loss": text + self.patch_weight * patches, "loss_text": text}
        metrics |= {"accuracy": accuracy}
        return metrics | ({"loss_patch": patches} if self.image_decoder is not None else {})

    def measure(self, rows: Rows) -> dict[str, Tensor]:
        seen = self.corrupt(self.in_step([rows.batch])[0])
        losses, hits, errors = self.rebuild(seen)
        sums = {"tokens": seen.token_mask.sum(), "loss": losses.sum(), "hits": hits.sum()}
        sums |= {"patches": seen.patch_mask.sum(), "errors": errors.sum()}
        if self.text_segment == "target":
            other = self._with_other_contexts(seen)
            loss = self.rebuild(other)[0].sum()
            alone = rows.num_rows == 1  # a row alone has no other
            compared = {"compared": sums["tokens"], "loss_own": sums["loss"], "loss_other": loss}
            sums |= {name: value * (not alone) for name, value in compared.items()}
        return sums

    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        text, patches = sums["loss"] / sums["tokens"], sums["errors"] / sums["patches"].clamp(min=1)
        found = {"loss": text + self.patch_weight * patches, "loss_text": text}
        found["accuracy"] = sums["hits"] / sums["tokens"]
        if self.image_decoder is not None:
            found["loss_patch"] = patches
        if sums.get("compared", 0):
            found["bridge_gain"] = (sums["loss_other"] - sums["loss_own"]) / sums["compared"]
        return found

    def hand_over(self, metrics: dict[str, float]) -> str:
        told = (
            f"validation: text loss {metrics['loss_text']:.3f}, accuracy {metrics['accuracy']:.1%}"
        )
        if "loss_patch" in metrics:
            told += f", patch loss {metrics['loss_patch']:.3f}"
        if "bridge_gain" not in metrics:
            return told
        told += f", bridge gain {metrics['bridge_gain']:.2f} nats/token"
        if metrics["bridge_gain"] < NO_BRIDGE_GAIN:
            told += (
                ": EOS still carries nothing of its context, "
                "and contrast will gain nothing from this stage"
            )
        return told

    def illustrate(self, rows: Rows) -> dict[str, Any]:
        few = rows.batch.select(0, min(MAX_PICTURES, rows.num_rows))
        seen = self.corrupt(self.in_step([few])[0])
        plan = self._plan(seen.batch)
        hidden = self.backbone(seen.batch, plan, seen.corrupted_pixels)
        pictures: dict[str, Any] = {
            "text": hidden_text(self.backbone, hidden, seen, self.processor.tokenizer)
        }
        if self.image_decoder is not None:
            predicted = self.image_decoder(self.backbone, hidden, seen.batch, plan, seen.patch_mask)
            if len(few.grids):
                pictures["images"] = image_triptychs(self.backbone, seen, predicted)
        return pictures

    def _plan(self, batch: Batch) -> Plan:
        return make_plan(self.policy, batch.segment_lengths).to(batch.input_ids.device)

    def _targets(self, seen: Corrupted) -> Tensor:
        merge_size = self.backbone.merge_size
        return token_pixels(seen.pixels, seen.batch, seen.patch_mask, merge_size=merge_size)

    def _with_other_contexts(self, seen: Corrupted) -> Corrupted:
        batch, tokens, patches = exchange_contexts(seen.batch)
        return Corrupted(
            batch,
            seen.labels[tokens],
            seen.token_mask[tokens],
            seen.patch_mask[tokens],
            seen.pixels[patches],
            seen.corrupted_pixels[patches],
        )


def _count(masks: Any) -> Tensor:
    return torch.stack([mask.sum() for mask in masks]).sum()
