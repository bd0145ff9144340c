"""Both sides of a stage's training step with the same weights: the project's module around a
wrapped model, and the re-created peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attention_bridge import policy
from benchmarks.benchmark import Task
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, torch_counts
from benchmarks.models import Shape, special_ids, stock_model
from benchmarks.ours import adapters_of, with_dora, wrapped
from benchmarks.peers.dora import adapt
from benchmarks.peers.model import PeerModel, PixelDecoder
from benchmarks.peers.steps import Collate, collator
from benchmarks.samples import make_processor
from cocoa_pl.models.adapters import FullTuning
from cocoa_pl.models.backbone import Backbone, ImageDecoder
from cocoa_pl.stages.base import Optimization, StageModule

RANK, ALPHA = 8, 64  # of the released scripts
NAMES = {
    ".lora_A.default.weight": ".a",
    ".lora_B.default.weight": ".b",
    ".lora_magnitude_vector.default.weight": ".magnitude",
}


@dataclass(frozen=True)
class Model:
    """What both sides are built of.

    Attributes:
        tuning: `dora`, `full`, or `none` where nothing trains.
        dropout: of adapters.
        dropout_on_base: of our adapters; peft's way if True.
    """

    shape: Shape
    dtype: torch.dtype
    kernel: str
    max_pixels: int
    tuning: str
    dropout: float
    dropout_on_base: bool


class Ours:
    """The project's side: a wrapped model and what makes samples for it."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model, self.device = model, device
        self.processor = make_processor(model.shape, model.max_pixels)
        backbone = wrapped(
            model.shape,
            image_processor=self.processor.image_processor,
            kernel=model.kernel,
            device=device,
            dtype=model.dtype,
        )
        self.backbone: Backbone = backbone.requires_grad_(False)
        if model.tuning == "full":
            self.backbone = FullTuning()(backbone)
        elif model.tuning == "dora":
            self.backbone = with_dora(
                backbone,
                rank=RANK,
                alpha=ALPHA,
                dropout=model.dropout,
                dropout_on_base=model.dropout_on_base,
            )

    def stage(self, kind: type[StageModule], **choices: Any) -> Any:
        """A stage's module, ready for one step outside of a trainer."""
        torch.manual_seed(0)  # of new heads
        module = kind(
            self.backbone,
            processor=self.processor,
            optimization=Optimization(2e-5, 0.0, (0.9, 0.98), "linear", 0, 1.0),
            steps=1,
            seed=0,
            **choices,
        )
        module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
        return module.to(self.device)


class Peer:
    """The re-created side, with the weights that ours has."""

    def __init__(self, model: Model, ours: Ours, *, attention: str, vision: str) -> None:
        device = ours.device
        stock = stock_model(model.shape, attention="sdpa", device=device, dtype=model.dtype)
        self.model = PeerModel(stock, table=policy(attention).table, vision=vision)
        stock.requires_grad_(model.tuning == "full")
        if model.tuning == "dora":
            adapters = adapters_of(ours.backbone)
            adapt(stock, adapters, scaling=ALPHA / RANK, dropout=model.dropout)
        self.model.to(device)
        pad_id = special_ids(model.shape)["bos_token_id"]
        self.collate: Collate = collator(
            image_processor=ours.processor.image_processor, pad_id=pad_id, device=device
        )

    def decoder(self, ours: ImageDecoder) -> PixelDecoder:
        """Its image decoder, with the weights of ours."""
        text = self.model.stock.model.language_model
        theirs = PixelDecoder(
            type(text.layers[0])(text.config, layer_idx=0),
            nn.Linear(ours.projection.in_features, ours.projection.out_features),
        )
        theirs.load_state_dict(ours.state_dict())
        return theirs.to(text.device, text.dtype)


def cleared(*modules: nn.Module | None) -> None:
    """Without gradients of an earlier run."""
    for module in modules:
        if module is not None:
            module.zero_grad(set_to_none=True)


def weights(*modules: nn.Module) -> list[Tensor]:
    """All parameters; what a graph keeps of them costs nothing."""
    return [parameter for module in modules for parameter in module.parameters()]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By the peer's names: of adapters, or of the stock model's own parameters."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        for prefix in ("backbone.model.base_model.model.", "backbone.model.", "stock."):
            name = name.removeprefix(prefix)
        for ending, theirs in NAMES.items():
            name = name.removesuffix(ending) + theirs if name.endswith(ending) else name
        found[name] = parameter.grad
    return found


def assert_same_step(task: Any, module: Any, model: Any) -> None:
    """Loss and all gradients, with dropout off."""
    module.eval()
    model.eval()
    try:
        losses = task.ours(), task.peer()
        ours, peer = gradients(module), gradients(model)
    finally:
        module.train()
        model.train()
    dtype = task.size.model.dtype
    assert_close([losses[0]], [losses[1]], dtype=dtype)
    assert peer
    assert peer.keys() <= ours.keys()
    flat = [torch.cat([side[name].flatten().float() for name in peer]) for side in (ours, peer)]
    assert_close([flat[0]], [flat[1]], dtype=dtype)


def counts_and_calls(task: Task, theirs: PeerModel, own: Backbone) -> Counts:
    """`torch_counts` of a task, and how often the language model of each side runs."""
    seen: dict[Any, list[int]] = {theirs: [], own: []}
    handles = [
        model.stock.model.language_model.register_forward_pre_hook(
            lambda *_, to=found: to.append(1)
        )
        for model, found in seen.items()
    ]
    counted = torch_counts(
        task.peer, task.ours, device=task.device, parameters=weights(theirs, own)
    )
    for handle in handles:
        handle.remove()
    return {"model_calls": Count(len(seen[theirs]), len(seen[own])), **counted}
