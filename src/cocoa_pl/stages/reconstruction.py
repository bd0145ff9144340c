"""Stages that rebuild what was hidden: captioning, warm-up, EOS bridge. Three configs of one
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cocoa_pl.attention.plan import on_device
from cocoa_pl.config.bounds import NotNegative, Share, ShareAboveZero
from cocoa_pl.corruption import Corruption, with_noise
from cocoa_pl.distributed.collectives import global_sum
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import shared_norms
from cocoa_pl.models.heads import ImageDecoder, token_pixels
from cocoa_pl.models.loading import NoVocabularyHead
from cocoa_pl.objectives import masked_next_token, rebuilt_patches
from cocoa_pl.stages.base import StageModule
from cocoa_pl.stages.chunks import Puzzle, Rebuilt, Step, ToRebuild
from cocoa_pl.stages.pictures import hidden_text, image_triptychs

# A bridge that gains less than this tells target tokens hardly anything about their context.
NO_BRIDGE_GAIN = 0.05  # nats per token


class ReconstructionModule(StageModule[Puzzle]):
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
        self.text_ratio = text_ratio
        self.text_segment = text_segment
        self.patch_ratio = patch_ratio
        self.patch_weight = patch_weight
        self.image_decoder = (
            ImageDecoder(backbone, patch_values=self.processor.patch_values)
            if patch_ratio
            else None
        )

    def preparation(self, *, validating: bool, device: torch.device | None = None) -> ToRebuild:
        corruption = Corruption(
            text_ratio=self.text_ratio,
            text_segment=self.text_segment,
            patch_ratio=self.patch_ratio,
            mask_token_id=self.processor.mask_id,
            merge_size=self.backbone.merge_size,
        )
        return ToRebuild(
            corruption,
            exchanging=validating and self.text_segment == "target",
            layouts=self.backbone.layouts(self.policy, device),
            token_budget=self.token_budget,
        )

    @property
    def empty(self) -> str:
        return (
            f"no {self.text_segment} had text to hide, and no image; look at the rows that the "
            "stage is given"
        )

    @property
    def parts(self) -> list[nn.Module]:
        return [self.backbone, *([self.image_decoder] if self.image_decoder is not None else [])]

    def rebuild(self, puzzle: Puzzle) -> Rebuilt:
        """What the model says in the place of what was hidden; the puzzle is on its device."""
        backbone, batch, layout = self.backbone, puzzle.batch, puzzle.layout
        if self.image_decoder is None:
            states = backbone(batch, layout, reads=puzzle.states)  # (M, D)
            return Rebuilt(backbone.vocabulary(states), None, None)
        pixels = backbone.pixels(batch)
        wanted = token_pixels(pixels, puzzle.visual_places, merge_size=backbone.merge_size)
        hidden = backbone(batch, layout, with_noise(pixels, puzzle.noise))  # (T, D)
        logits = backbone.vocabulary(hidden.index_select(0, puzzle.states))
        predicted = self.image_decoder(backbone, hidden, batch, layout, puzzle.visual_rows)
        return Rebuilt(logits, predicted, wanted)

    def compare(self, puzzle: Puzzle) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropies (M) and hits (M) of hidden tokens, squared errors (V) of hidden visual
        tokens.
        """
        rebuilt = self.rebuild(puzzle)
        losses, hits = masked_next_token(rebuilt.logits, puzzle.targets)
        if rebuilt.predicted is None or rebuilt.wanted is None:
            return losses, hits, losses.new_zeros(0)
        return losses, hits, rebuilt_patches(rebuilt.predicted, rebuilt.wanted)

    def accumulate(self, step: Step[Puzzle]) -> dict[str, Tensor]:
        """`targets` are hidden tokens and hidden visual tokens."""
        hidden = self._counts(step.chunks)
        counts = hidden.clamp(min=1)
        sums = torch.zeros(3, device=self.device)
        with shared_norms(self.backbone):
            for puzzle in self.at_work(step.chunks):
                losses, hits, errors = self.compare(puzzle)
                text, patches = losses.sum() / counts[0], errors.sum() / counts[1]
                self.manual_backward(text + self.patch_weight * patches)
                sums += torch.stack([text, hits.sum() / counts[0], patches]).detach()
        text, accuracy, patches = global_sum(sums)
        metrics = {"loss": text + self.patch_weight * patches, "loss_text": text}
        metrics |= {"accuracy": accuracy, "targets": hidden.sum()}
        return metrics | ({"loss_patch": patches} if self.image_decoder is not None else {})

    def measure(self, step: Step[Puzzle]) -> dict[str, Tensor]:
        tokens, loss, hits, patches, errors = self._sums(step.chunks)
        sums = {"tokens": tokens, "loss": loss, "hits": hits}
        sums |= {"patches": patches, "errors": errors}
        if self.text_segment == "target":
            _, other, *_ = self._sums(step.others)
            has_others = len(step.others) > 0
            compared = {"compared": tokens, "loss_own": loss, "loss_other": other}
            sums |= {name: value * has_others for name, value in compared.items()}
        return sums

    def _sums(self, puzzles: Sequence[Puzzle]) -> Tensor:
        """(5): hidden tokens, their losses, hits, hidden visual tokens, their errors."""
        sums = torch.zeros(5, device=self.device)
        for puzzle in self.at_work(puzzles):
            losses, hits, errors = self.compare(puzzle)
            tokens, patches = (torch.full_like(sums[0], len(one)) for one in (losses, errors))
            sums += torch.stack([tokens, losses.sum(), hits.sum(), patches, errors.sum()])
        return sums

    def _counts(self, puzzles: Sequence[Puzzle]) -> Tensor:
        """Hidden tokens and hidden visual tokens of the global batch: (2) float."""
        tokens = sum(len(puzzle.targets) for puzzle in puzzles)
        patches = sum(len(puzzle.visual_rows) for puzzle in puzzles)
        here = torch.tensor([tokens, patches], dtype=torch.float32)
        return global_sum(on_device(here, self.device))

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

    def hand_over(self, metrics: dict[str, float]) -> str:
        told = "validation: no text was hidden"
        if "loss_text" in metrics:
            told = f"validation: text loss {metrics['loss_text']:.3f}"
            told += f", accuracy {metrics['accuracy']:.1%}"
        if "loss_patch" in metrics:
            told += f", patch loss {metrics['loss_patch']:.3f}"
        elif self.image_decoder is not None:
            told += ", no image was hidden"
        if "bridge_gain" not in metrics:
            alone = self.text_segment == "target"
            return told + (", no other context to measure the bridge gain with" if alone else "")
        told += f", bridge gain {metrics['bridge_gain']:.2f} nats/token"
        if metrics["bridge_gain"] < NO_BRIDGE_GAIN:
            told += (
                ": EOS still carries nothing of its context, "
                "and contrast will gain nothing from this stage"
            )
        return told

    def illustrate(self, step: Step[Puzzle]) -> dict[str, Any]:
        puzzle = self.in_step(step.chunks[:1])[0].to(self.device)
        rebuilt = self.rebuild(puzzle)
        guesses = rebuilt.logits.argmax(1)
        pictures: dict[str, Any] = {
            "text": hidden_text(puzzle, guesses, self.processor.tokenizer),
        }
        if rebuilt.predicted is not None and len(puzzle.visual_rows):
            pictures["images"] = image_triptychs(self.backbone, puzzle, rebuilt.predicted)
        return pictures
