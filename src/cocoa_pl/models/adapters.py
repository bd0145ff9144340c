"""A backbone in; the same backbone with the parameters that shall train out."""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cocoa_pl.config.bounds import Count, ShareBelowOne
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import make_lean

log = logging.getLogger(__name__)


class FullTuning:
    """Every parameter of the backbone trains, in float32 whatever the model computes in.

    In bfloat16 an update of less than 1/256 of a weight would round away.
    """

    def __call__(self, backbone: Backbone) -> Backbone:
        return backbone.float().requires_grad_(True)


class LowRank:
    """LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353) through peft, adapters in float32.

    In bfloat16 most updates at the paper's learning rate would round away (`A` is about 1/r, its
    spacing 1e-3).

    Args:
        target_modules: one regular expression over full module names, for the language model and
            the vision tower.
        use_dora: DoRA instead of LoRA.
        lean_dora: DoRA's norms once per optimizer step and without an identity matrix; the same
            outputs to rounding. Without DoRA it changes nothing.
        dropout_on_base: DoRA's dropout also in its (m / norm - 1) W x, as peft does it; False needs
            `lean_dora` and saves a second product with W.

    Raises:
        UserError: if an expression matches nothing in the model, or for `dropout_on_base` off
            without `lean_dora`.
    """

    def __init__(
        self,
        *,
        rank: Count,
        alpha: Count,
        dropout: ShareBelowOne,
        init: str,
        use_dora: bool,
        target_modules: Sequence[str],
        lean_dora: bool,
        dropout_on_base: bool,
    ) -> None:
        if not (lean_dora or dropout_on_base):
            raise UserError("adapter.dropout_on_base=false needs adapter.lean_dora=true")
        self.lean_dora = lean_dora
        self.dropout_on_base = dropout_on_base
        self.target_modules = tuple(target_modules)
        self.config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights=init,  # type: ignore[arg-type]
            use_dora=use_dora,
            target_modules="|".join(f"(?:{expression})" for expression in target_modules),
        )

    def __call__(self, backbone: Backbone) -> Backbone:
        for expression in self.target_modules:
            _require_match(backbone, expression)
        backbone.model = peft.get_peft_model(backbone.model, self.config)
        if self.lean_dora:
            make_lean(backbone.model, dropout_on_base=self.dropout_on_base)
        # Autocast rounds what enters a product: a float32 copy first changes nothing. peft's own
        # DoRA takes its norms in the type of the input.
        if self.lean_dora or not self.config.use_dora:
            for module in backbone.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False
        for parameter in backbone.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise AssertionError("peft no longer keeps adapters in float32")
        return backbone


def trainable_line(module: nn.Module) -> str:
    """One line for the log: how many parameters train."""
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)"


def merged(backbone: Backbone) -> Backbone:
    """The backbone as a plain model: adapters folded into a copy of the weights, or itself where
    there are none.
    """
    if not isinstance(backbone.model, peft.PeftModel):
        return backbone
    plain = copy.deepcopy(backbone)
    copied: Any = plain.model
    plain.model = copied.merge_and_unload()
    return plain


def check_trained(state: Mapping[str, Tensor], *, where: Path | str) -> None:
    """Tell adapters that never trained from those of a part that the data never used, such as the
    vision tower on texts alone.

    Raises:
        UserError: if every LoRA `B`, which is zero at first, is zero still.
    """
    matrices = {name: value for name, value in state.items() if ".lora_B." in name}
    untouched = sorted(name for name, value in matrices.items() if not value.any())
    if untouched and len(untouched) == len(matrices):
        raise UserError(f"{where} was never trained: all lora_B are zero, first {untouched[0]}")
    if untouched:
        log.warning(
            "%s: %d of %d lora_B are zero, first %s: no data ever used them",
            *(where, len(untouched), len(matrices), untouched[0]),
        )


def _require_match(backbone: Backbone, expression: str) -> None:
    if not any(re.fullmatch(expression, name) for name, _ in backbone.model.named_modules()):
        raise UserError(f"adapter.target_modules: {expression!r} matches no module of the model")
