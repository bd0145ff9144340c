"""The generative stages, which rebuild what was hidden: captioning, warm-up and EOS bridge are
three configs of one module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cocoa_pl.attention.plan import on_device
from cocoa_pl.config.bounds import NotNegative, Share, ShareAboveZero
from cocoa_pl.data.batch import Batch
from cocoa_pl.data.masking import Masking, with_noise
from cocoa_pl.distributed.collectives import global_sum
from cocoa_pl.errors import UserError
from cocoa_pl.losses import masked_next_token, rebuilt_patches
from cocoa_pl.models.backbone import Backbone, ImageDecoder, NoVocabularyHead
from cocoa_pl.models.dora import shared_norms
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.callbacks import hidden_text, image_triptychs

# Below this, target tokens learn hardly anything of their context through the bridge.
NO_BRIDGE_GAIN = 0.05  # nats per token


class ReconstructionModule(StageModule):
    """Masked text, and optionally masked patches, predicted from what is left.

    Args:
        text_ratio, text_segment, patch_ratio: see `Masking`; a patch_ratio of 0 leaves out the
            image decoder.
        patch_weight: of the pixel loss beside the token loss.
    """

    measures = ("loss", "loss_text", "accuracy", "loss_patch", "bridge_gain")

    def __init__(
        self,
        backbone: Backbone,
        *,
        text_ratio: ShareAboveZero | None,
        text_segment: Literal["context", "target"],
        patch_ratio: Share,
        patch_weight: NotNegative,
        **shared: Any,
    ) -> None:
        super().__init__(backbone, **shared)
        if isinstance(backbone.stock.get_output_embeddings(), NoVocabularyHead):
            raise UserError(
                "a stage that predicts words needs a vocabulary head, and the model's files hold "
                "none (lm_head.weight); start from the generative model, or with stage=contrast"
            )
        self.empty = (
            f"no {text_segment} had text to hide, and no image; look at the rows that the stage "
            "is given"
        )
        self.masking = Masking(
            text_ratio=text_ratio,
            text_segment=text_segment,
            patch_ratio=patch_ratio,
            mask_token_id=self.processor.mask_id,
        )
        self.exchanges = text_segment == "target"
        self.patch_weight = patch_weight
        self.image_decoder = (
            ImageDecoder(backbone, patch_values=self.processor.patch_values)
            if patch_ratio
            else None
        )

    def rebuild(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the model predicts of a batch on its device.

        Returns:
            Logits (M, V) of hidden tokens, and (N, merge_size ** 2 * B) normalised pixels of hidden
            visual tokens: as predicted, and as they are; N is 0 without an image decoder.
        """
        backbone, decoder = self.backbone, self.image_decoder
        if decoder is None:
            hidden = backbone(batch)  # (T, D)
        else:
            pixels = backbone.pixels(batch)  # (P, B)
            # Without a name: what is shown would stay until the loss, the size of all pixels.
            hidden = backbone(batch, with_noise(pixels, batch, merge_size=backbone.merge_size))
        # Only states that predict: logits of all T tokens would be a step's largest tensor.
        logits = backbone.vocabulary(hidden.index_select(0, batch.token_rows))
        if decoder is None:
            return logits, logits.new_zeros(0, 1), logits.new_zeros(0, 1)
        tokens = pixels.view(-1, backbone.merge_size**2 * pixels.shape[1])  # (V, ...)
        expected = tokens.index_select(0, batch.patch_places)
        return logits, decoder(backbone, hidden, batch), expected

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies (M) and hits (M) of hidden tokens, squared errors (N) of hidden visual
        tokens.
        """
        logits, predicted, expected = self.rebuild(batch)
        return *masked_next_token(logits, batch.targets), rebuilt_patches(predicted, expected)

    def accumulate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """`targets` counts hidden tokens and hidden visual tokens."""
        counts = [sum(len(b.targets) for b in batches), sum(len(b.patch_rows) for b in batches)]
        here = on_device(torch.tensor(counts, dtype=torch.float32), self.device)
        hidden = global_sum(here)  # (2), of the global batch
        num_tokens, num_patches = hidden.clamp(min=1)
        sums = torch.zeros(3, device=self.device)
        with shared_norms(self.backbone):
            for batch in self.aligned(batches):
                losses, hits, errors = self.losses(batch.to(self.device))
                text, patches = losses.sum() / num_tokens, errors.sum() / num_patches
                self.manual_backward(text + self.patch_weight * patches)
                sums += torch.stack([text, hits.sum() / num_tokens, patches]).detach()
        text, accuracy, patches = global_sum(sums)
        metrics = {"loss": text + self.patch_weight * patches, "loss_text": text}
        metrics |= {"accuracy": accuracy, "targets": hidden.sum()}
        return metrics | ({"loss_patch": patches} if self.image_decoder is not None else {})

    def measure(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        sums = self._sums([batch for batch in batches if not batch.exchanged])
        if self.exchanges:
            exchanged = [batch for batch in batches if batch.exchanged]
            is_compared = len(exchanged) > 0  # a row alone has no other context
            sums |= {
                "compared": sums["tokens"] * is_compared,
                "loss_own": sums["loss"] * is_compared,
                "loss_other": self._sums(exchanged)["loss"],
            }
        return sums

    def _sums(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        sums = torch.zeros(5, device=self.device)
        for batch in self.aligned(batches):
            losses, hits, errors = self.losses(batch.to(self.device))
            tokens, patches = (torch.full_like(sums[0], len(one)) for one in (losses, errors))
            sums += torch.stack([tokens, losses.sum(), hits.sum(), patches, errors.sum()])
        return dict(zip(("tokens", "loss", "hits", "patches", "errors"), sums, strict=True))

    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """What nothing was hidden of has no mean."""
        found = {}
        if sums["tokens"]:
            found["loss"] = found["loss_text"] = sums["loss"] / sums["tokens"]
            found["accuracy"] = sums["hits"] / sums["tokens"]
        if sums["patches"]:
            found["loss_patch"] = sums["errors"] / sums["patches"]
            found["loss"] = found.get("loss", 0) + self.patch_weight * found["loss_patch"]
        if sums.get("compared", 0):
            found["bridge_gain"] = (sums["loss_other"] - sums["loss_own"]) / sums["compared"]
        return found

    def summary_line(self, metrics: dict[str, float]) -> str:
        line = "validation: no text was hidden"
        if "loss_text" in metrics:
            line = f"validation: text loss {metrics['loss_text']:.3f}"
            line += f", accuracy {metrics['accuracy']:.1%}"
        if "loss_patch" in metrics:
            line += f", patch loss {metrics['loss_patch']:.3f}"
        elif self.image_decoder is not None:
            line += ", no image was hidden"
        if "bridge_gain" not in metrics:
            alone = ", no other context to measure the bridge gain with"
            return line + (alone if self.exchanges else "")
        line += f", bridge gain {metrics['bridge_gain']:.2f} nats/token"
        if metrics["bridge_gain"] < NO_BRIDGE_GAIN:
            line += (
                ": EOS still carries nothing of its context, "
                "and contrast will gain nothing from this stage"
            )
        return line

    def pictures(self, batches: Sequence[Batch]) -> dict[str, Any]:
        batch = self.aligned(batches[:1])[0]
        moved = batch.to(self.device)
        logits, predicted, _ = self.rebuild(moved)
        found: dict[str, Any] = {"text": hidden_text(batch, logits.argmax(1), self.processor)}
        if len(batch.patch_rows):
            found["images"] = image_triptychs(self.backbone, moved, predicted)
        return found
