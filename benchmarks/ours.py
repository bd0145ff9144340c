"""The project's side of a whole step: the weights of a stock model, wrapped and adapted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Shape, stock_model
from cocoa_pl.attention import TEXT_ATTENTION
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.qwen_vl import Qwen2VLBackbone

# Of the released scripts: the language model's projections, and the vision tower's.
TARGETS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.fc\d)",
)


def wrapped(
    shape: Shape, *, image_processor: Any, kernel: str, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """A backbone with the weights that `stock_model` gives the peer."""
    model = stock_model(shape, attention=TEXT_ATTENTION, device=device, dtype=dtype)
    backbone = Qwen2VLBackbone(model, image_processor, kernel=kernel)
    return backbone.to(device)


def with_dora(
    backbone: Backbone, *, rank: int, alpha: int, dropout: float, dropout_on_base: bool
) -> Backbone:
    """DoRA on all `TARGETS`, with factors as after some training: at first B is zero."""
    adapter = LowRank(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        init="gaussian",
        use_dora=True,
        target_modules=TARGETS,
        lean_dora=True,
        dropout_on_base=dropout_on_base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = adapter(backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return backbone


def adapters_of(backbone: Backbone) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, B and magnitudes by the names of the stock model's modules, for `peers.dora.adapt`."""
    found = {}
    for name, module in backbone.model.named_modules():
        layers: Any = dict(module.named_children())
        if "lora_magnitude_vector" in layers:
            a, b, magnitude = (
                layers[part]["default"].weight
                for part in ("lora_A", "lora_B", "lora_magnitude_vector")
            )
            found[name.removeprefix("base_model.model.")] = (a, b, magnitude)
    return found
