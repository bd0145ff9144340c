"""A step never waits for the device.

Each runs on a device whose tensors have no values (`meta`): what reads one back, or needs one to
know a size, fails. On a GPU each of these would be a wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Encoded, Rows
from cocoa_pl.data.datamodule import collate
from cocoa_pl.data.items import Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.distributed.collectives import clip_gradients, sum_gradients
from cocoa_pl.models.adapters import FullTuning, LowRank
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.reconstruction import ReconstructionModule

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

ALL = ("context", "eos", "target")
FULL = Policy("bidirectional", ALL, ALL, ALL, causal=False)
CAUSAL = Policy("causal", ALL, ALL, ALL, causal=True)
BRIDGE = Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), causal=False)
STAGES: dict[str, tuple[type[StageModule[Any]], Policy, dict[str, Any]]] = {
    "captioning": (
        ReconstructionModule,
        CAUSAL,
        {"text_ratio": None, "text_segment": "context", "patch_ratio": 0.0, "patch_weight": 0.0},
    ),
    "warmup": (
        ReconstructionModule,
        FULL,
        {"text_ratio": 0.2, "text_segment": "context", "patch_ratio": 0.5, "patch_weight": 0.5},
    ),
    "reconstruct": (
        ReconstructionModule,
        BRIDGE,
        {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0, "patch_weight": 0.0},
    ),
    "contrast": (
        ContrastiveModule,
        FULL,
        {
            "temperature": 0.1,
            "learn_temperature": True,
            "symmetric": True,
            "mask_false_negatives": True,
            "matryoshka_dims": (8,),
            "similarity_block": 4,
            "keep_gib": 0,
        },
    ),
}
ADAPTERS: dict[str, Callable[[Backbone], Backbone]] = {
    "full": FullTuning(),
    "dora": LowRank(
        rank=2,
        alpha=4,
        dropout=0.1,
        init="gaussian",
        use_dora=True,
        target_modules=[r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"],
        lean_dora=True,
        dropout_on_base=True,
    ),
}


class Nowhere(torch.autocast):
    """Autocast knows no such device, and has nothing to do in float32."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return nullcontext()


@pytest.fixture
def make(
    load_tiny: Callable[..., Loaded], processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StageModule[Any]]:
    def module(stage: str, adapter: str) -> StageModule[Any]:
        kind, policy, choices = STAGES[stage]
        made = kind(
            ADAPTERS[adapter](load_tiny().backbone),
            processor=processor,
            policy=policy,
            optimization=Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
            token_budget=40,
            steps=1,
            seed=0,
            **choices,
        )
        monkeypatch.setattr(made, "manual_backward", lambda loss: loss.backward())
        monkeypatch.setattr(torch, "autocast", Nowhere)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        return made

    return module


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> dict[str, Rows]:
    def encode(seed: int, images: int, target: str | None = None) -> Encoded:
        item = make_item(seed, images=images)
        return processor.encode(item, target, key=item.key, seed=seed, row_id=f"row {seed}")

    pairs = [[encode(n, 1), encode(20 + n, 0)] for n in range(5)]
    texts = [[encode(n, n % 3, make_item(50 + n).text)] for n in range(5)]
    return {"contrast": collate(pairs), "others": collate(texts)}


@pytest.mark.parametrize(
    "adapter", [pytest.param(one, marks=[pytest.mark.slow] * (one == "full")) for one in ADAPTERS]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_training_step_is_queued_without_a_wait(
    stage: str, adapter: str, make: Callable[..., StageModule[Any]], rows: dict[str, Rows]
) -> None:
    module = make(stage, adapter).train()
    step = module.preparation(validating=False)(rows.get(stage, rows["others"]))
    assert len(step.chunks) > 2
    module.to("meta")
    metrics = module.accumulate(step)
    sum_gradients(module.parameters())
    metrics["norm"] = clip_gradients(module.parameters(), 1.0)
    assert all(value.device.type == "meta" for value in metrics.values())
    unused = {n for n, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert unused <= {"backbone.model.lm_head.weight"}  # contrast has no use for it


@pytest.mark.parametrize("stage", STAGES)
def test_neither_does_validation_wait(
    stage: str, make: Callable[..., StageModule[Any]], rows: dict[str, Rows]
) -> None:
    module = make(stage, "full").eval()
    step = module.preparation(validating=True)(rows.get(stage, rows["others"]))
    module.to("meta")
    with torch.no_grad():
        sums = module.measure(step)
    assert {value.device.type for value in sums.values()} == {"meta"}


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero])
def test_reading_such_a_tensor_fails(read: Callable[[Tensor], object], family: str) -> None:
    """The tests above can fail."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))
