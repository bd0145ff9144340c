"""In bfloat16: what trains stays float32, and chunks, caches and losses stay exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.adapters import FullTuning
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from tests.adapters import TEXT, low_rank
from tests.stages.steps import Rows, batches_of, make_module, make_rows


def dora(backbone: Backbone) -> Backbone:
    adapter = low_rank(rank=4, target_modules=[TEXT])
    torch.manual_seed(0)
    return adapter(backbone)


TUNINGS: dict[str, Callable[[Backbone], Backbone]] = {"full": FullTuning(), "dora": dora}


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Rows:
    return make_rows("contrast", 6, processor, make_item)


@pytest.fixture
def step(
    load_tiny: Callable[..., Loaded], processor: Processor, rows: Rows
) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of a contrastive step."""

    def run(tuning: str, dtype: str, *, token_budget: int) -> tuple[float, dict[str, Tensor]]:
        backbone = TUNINGS[tuning](load_tiny(dtype=dtype).backbone)
        module = make_module(
            "contrast",
            backbone,
            processor,
            token_budget=token_budget,
            learn_temperature=False,
            symmetric=False,
            mask_false_negatives=False,
            matryoshka_dims=(),
        )
        loss = module.accumulate(batches_of(module, rows))["loss"]
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
    load_tiny: Callable[..., Loaded], processor: Processor, make_item: Callable[..., Item]
) -> None:
    module = make_module("warmup", dora(load_tiny(dtype="bfloat16").backbone), processor)
    rows = make_rows("warmup", 6, processor, make_item)
    metrics = module.accumulate(batches_of(module, rows))
    assert all(value.isfinite() for value in metrics.values())
    for name, parameter in module.image_decoder.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
