"""In bfloat16: what trains stays float32, and chunks, caches and losses stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.adapters import FullTuning
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from tests.adapters import TEXT, low_rank
from tests.stages.steps import Found, Rows, batches_of, make_module, make_rows, step


def dora(backbone: Backbone) -> Backbone:
    adapter = low_rank(rank=4, target_modules=[TEXT])
    torch.manual_seed(0)
    return adapter(backbone)


PLAIN: dict[str, Any] = {
    **dict.fromkeys(("learn_temperature", "symmetric", "mask_false_negatives"), False),
    "matryoshka_dims": (),
}
TUNINGS: dict[str, Callable[[Backbone], Backbone]] = {"full": FullTuning(), "dora": dora}


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Rows:
    return make_rows("contrast", 6, processor, make_item)


@pytest.fixture
def run(load_tiny: Callable[..., Loaded], processor: Processor, rows: Rows) -> Callable[..., Found]:
    """Loss and gradients of a contrastive step."""

    def one(tuning: str, dtype: str, *, token_budget: int) -> Found:
        backbone = TUNINGS[tuning](load_tiny(dtype=dtype).backbone)
        module = make_module("contrast", backbone, processor, token_budget=token_budget, **PLAIN)
        found = step(module, [rows])
        assert found["metric loss"].dtype == torch.float32
        return found

    return one


def nearly(found: Found, expected: Found) -> float:
    """Cosine between two gradients over all parameters."""
    assert found.keys() == expected.keys()
    names = [name for name in found if not name.startswith("metric")]
    first, second = (torch.cat([f[n].flatten().double() for n in names]) for f in (found, expected))
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
def test_a_gradient_cache_in_bfloat16_gives_the_gradient_of_one_pass_which_is_near_float32s(
    tuning: str, run: Callable[..., Found]
) -> None:
    """A cast weight that autocast keeps from the first pass, without gradient, would lose it."""
    exact, whole = (run(tuning, d, token_budget=100_000) for d in ("float32", "bfloat16"))
    cached = run(tuning, "bfloat16", token_budget=40)
    torch.testing.assert_close(cached["metric loss"], whole["metric loss"], rtol=1e-2, atol=0)
    assert nearly(cached, whole) > 0.999
    assert [n for n, g in cached.items() if not g.any() and whole[n].any()] == []
    torch.testing.assert_close(whole["metric loss"], exact["metric loss"], rtol=5e-2, atol=0)
    assert nearly(whole, exact) > 0.95


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
