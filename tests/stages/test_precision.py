"""In bfloat16: what trains stays float32, and chunks, caches and losses stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Encoded, Rows
from cocoa_pl.data.datamodule import collate
from cocoa_pl.data.items import Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.models.adapters import FullTuning, LowRank
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages.base import Optimization
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.reconstruction import ReconstructionModule

EVERYTHING = ("context", "eos", "target")
FULL = Policy("bidirectional", EVERYTHING, EVERYTHING, EVERYTHING, causal=False)
SHARED: dict[str, Any] = {
    "policy": FULL,
    "optimization": Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
    "steps": 1,
    "seed": 0,
}


def dora(backbone: Backbone) -> Backbone:
    adapter = LowRank(
        lean_dora=False,
        dropout_on_base=True,
        rank=4,
        alpha=8,
        dropout=0.0,
        init="gaussian",
        use_dora=True,
        target_modules=[r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"],
    )
    torch.manual_seed(0)
    return adapter(backbone)


TUNINGS: dict[str, Callable[[Backbone], Backbone]] = {"full": FullTuning(), "dora": dora}


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Rows:
    def encode(seed: int, images: int) -> Encoded:
        item = make_item(seed, images=images)
        return processor.encode(item, None, key=item.key, seed=seed, row_id=f"row {seed}")

    return collate([[encode(n, 1), encode(20 + n, 0)] for n in range(6)])


@pytest.fixture
def step(
    load_tiny: Callable[..., Loaded], processor: Processor, rows: Rows
) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of a contrastive step."""

    def run(tuning: str, dtype: str, *, token_budget: int) -> tuple[float, dict[str, Tensor]]:
        module = ContrastiveModule(
            TUNINGS[tuning](load_tiny(dtype=dtype).backbone),
            processor=processor,
            temperature=0.1,
            learn_temperature=False,
            symmetric=False,
            mask_false_negatives=False,
            matryoshka_dims=(),
            similarity_block=4,
            keep_gib=0,
            token_budget=token_budget,
            **SHARED,
        )
        module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
        loss = module.accumulate(module.preparation(validating=False)(rows))["loss"]
        assert loss.dtype == torch.float32
        return float(loss), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}

    return run


def nearly(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Cosine between two gradients over all parameters."""
    assert found.keys() == expected.keys()
    first, second = (torch.cat([g[n].flatten().double() for n in found]) for g in (found, expected))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_trains_is_float32_and_the_rest_is_not(
    tuning: str, load_tiny: Callable[..., Loaded]
) -> None:
    backbone = TUNINGS[tuning](load_tiny(dtype="bfloat16").backbone)
    assert backbone.compute_dtype == torch.bfloat16
    for parameter in backbone.parameters():
        expected = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == expected


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_gradient_cache_in_bfloat16_gives_the_gradient_of_one_pass(
    tuning: str, step: Callable[..., tuple[float, dict[str, Tensor]]]
) -> None:
    """A cast weight that autocast keeps from the first pass, without gradient, would lose it."""
    loss, whole = step(tuning, "bfloat16", token_budget=100_000)
    cached_loss, cached = step(tuning, "bfloat16", token_budget=40)
    assert cached_loss == pytest.approx(loss, rel=1e-2)
    assert nearly(cached, whole) > 0.999
    zeros = [n for n, g in cached.items() if not g.any() and whole[n].any()]
    assert zeros == []


@pytest.mark.parametrize("tuning", TUNINGS)
def test_bfloat16_is_near_float32(
    tuning: str, step: Callable[..., tuple[float, dict[str, Tensor]]]
) -> None:
    loss, exact = step(tuning, "float32", token_budget=100_000)
    rounded_loss, rounded = step(tuning, "bfloat16", token_budget=100_000)
    assert rounded_loss == pytest.approx(loss, rel=5e-2)
    assert nearly(rounded, exact) > 0.95


def test_the_image_decoder_works_beside_a_model_in_bfloat16(
    load_tiny: Callable[..., Loaded], processor: Processor, rows: Rows
) -> None:
    module = ReconstructionModule(
        dora(load_tiny(dtype="bfloat16").backbone),
        processor=processor,
        text_ratio=0.3,
        text_segment="context",
        patch_ratio=0.5,
        patch_weight=0.5,
        token_budget=60,
        **SHARED,
    )
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
    metrics = module.accumulate(module.preparation(validating=False)(rows))
    assert all(value.isfinite() for value in metrics.values())
    assert module.image_decoder is not None
    for name, parameter in module.image_decoder.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
