"""Modules of all stages around a tiny model, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.data.batch import Batch, Sample
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.reconstruction import ReconstructionModule
from tests.attention.oracle import OURS

CAPTIONS: dict[str, Any] = {
    "text_ratio": None,
    "text_segment": "context",
    "patch_ratio": 0.0,
    "patch_weight": 0.0,
}
STAGES: dict[str, tuple[type[StageModule], Policy, dict[str, Any]]] = {
    "pretrain": (ReconstructionModule, OURS["causal"], CAPTIONS),
    "warmup": (
        ReconstructionModule,
        OURS["bidirectional"],
        {"text_ratio": 0.3, "text_segment": "context", "patch_ratio": 0.5, "patch_weight": 0.5},
    ),
    "reconstruct": (
        ReconstructionModule,
        OURS["eos_bridge"],
        {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0, "patch_weight": 0.0},
    ),
    "contrast": (
        ContrastiveModule,
        OURS["bidirectional"],
        {
            "temperature": 0.1,
            "learn_temperature": True,
            "symmetric": True,
            "mask_false_negatives": True,
            "matryoshka_dims": (8,),
            "similarity_block": 4,
        },
    ),
}

Rows = list[list[Sample]]
Found = dict[str, Tensor]


def make_module(
    stage: str, backbone: Backbone, processor: Processor, *, token_budget: int = 60, **choices: Any
) -> Any:
    """A stage's module, ready for steps outside of a trainer."""
    kind, policy, values = STAGES[stage]
    torch.manual_seed(0)  # of the image decoder
    made = kind(
        backbone,
        processor=processor,
        policy=policy,
        optimization=Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
        token_budget=token_budget,
        steps=1,
        seed=0,
        **(values | choices),
    )
    made.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
    return made


def make_rows(
    stage: str, count: int, processor: Processor, make_item: Callable[..., Item], *, images: int = 1
) -> Rows:
    """Pairs of picture and text for contrast, a picture with a TARGET for the other stages.

    Rows that have the same number modulo four are of the same size.

    Args:
        images: of row n there are n % (images + 1), or one in each if it is 1.
    """

    def sample(seed: int, images: int, *, target: bool = False, role: int = 0) -> Sample:
        item, words = (make_item(start + seed % 4, images=images) for start in (0, 70))
        row_id = f"row {seed % 1000}"
        text = words.plain_text if target else None
        return processor(item, text, key=seed, row_id=row_id, role=role)

    if stage == "contrast":
        return [[sample(n, 1), sample(1000 + n, 0, role=1)] for n in range(count)]
    counts = [1 if images == 1 else n % (images + 1) for n in range(count)]
    return [[sample(n, images, target=True)] for n, images in enumerate(counts)]


def masked(module: StageModule, rows: Rows) -> Rows:
    """The rows as workers hand them to the collator; what is hidden follows from the row."""
    masking = module.masking
    if masking is None:
        return rows
    return [
        [masking(sample, np.random.default_rng(int(sample.row_id.split()[1]))) for sample in row]
        for row in rows
    ]


def batches_of(module: StageModule, rows: Rows, *, validating: bool = False) -> list[Batch]:
    return module.collator(validating=validating)(masked(module, rows))


def step(module: StageModule, rows: Sequence[Rows]) -> Found:
    """Metrics of the last of some steps, and the gradients of all, by name."""
    metrics: Found = {}
    for some in rows:
        metrics = module.accumulate(batches_of(module, some))
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {f"metric {name}": value for name, value in metrics.items()} | gradients


def assert_close(found: Found, expected: Found, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=name)
