"""Ways to save memory or time in a contrastive step do not change its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.data.batch import Sample
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.models import dora
from cocoa_pl.models.dora import LeanDora
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages.contrastive import MAX_SCALE, ContrastiveModule, Temperature
from tests.adapters import TEXT, low_rank
from tests.stages.steps import Found, Rows, assert_close, batches_of, make_module, step

Make = Callable[..., ContrastiveModule]


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Rows:
    """Six pairs, the last with a hard negative; two share their query, so something is masked."""

    def sample(seed: int, images: int, role: int) -> Sample:
        item = make_item(seed, images=images)
        return processor(item, None, key=item.key, row_id=f"row {seed}", role=role)

    rows = [[sample(max(n, 1), 1, 0), sample(20 + n, 0, 1)] for n in range(6)]
    rows[5].append(sample(40, 0, 2))
    return rows


@pytest.fixture
def make(load_tiny: Callable[..., Loaded], processor: Processor) -> Make:
    """A stage with everything on: dropout, masks, both directions, widths, a learnt temperature."""

    def module(*, lean: bool = False, **choices: Any) -> ContrastiveModule:
        torch.manual_seed(0)
        adapter = low_rank(rank=4, dropout=0.3, target_modules=[TEXT], lean_dora=lean)
        backbone = adapter(load_tiny().backbone)
        choices = {"matryoshka_dims": (8, 16), "token_budget": 32} | choices
        made: ContrastiveModule = make_module("contrast", backbone, processor, **choices)
        return made.train()

    return module


@pytest.fixture
def plain(make: Make, rows: Rows) -> Found:
    """The slow twin: one table of similarities, peft's own layers."""
    module = make(similarity_block=1000)
    assert len(batches_of(module, rows)) > 3
    torch.manual_seed(5)
    return step(module, [rows])


def test_the_loss_is_that_of_the_rows_however_they_are_cut(make: Make, rows: Rows) -> None:
    """Without dropout, one batch of all samples has the queries, positives and negatives in order:
    its loss is written out here.
    """
    module = make(symmetric=False, matryoshka_dims=(), mask_false_negatives=False).eval()
    (batch,) = make(token_budget=10_000).collator(validating=False)(rows)
    vectors = module.backbone.embed(batch)[batch.places.argsort()]
    expected = torch.nn.functional.cross_entropy(
        vectors[:6] @ vectors[6:].T * module.temperature(), torch.arange(6)
    )
    found = module.accumulate(batches_of(module, rows))["loss"]
    torch.testing.assert_close(found, expected.detach())


def test_row_blocks_and_norms_taken_once_in_a_step_change_no_value(
    make: Make, rows: Rows, plain: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    original = dora.row_norms

    def counted(*given: Any) -> Tensor:
        taken.append(1)
        return original(*given)

    monkeypatch.setattr(dora, "row_norms", counted)
    module = make(lean=True, similarity_block=4)
    layers = sum(isinstance(part, LeanDora) for part in module.modules())
    torch.manual_seed(5)
    assert_close(step(module, [rows]), plain, rtol=1e-3)
    assert len(taken) == layers == 14
    step(module, [rows])
    assert len(taken) == 2 * layers


def test_a_fixed_temperature_is_what_the_user_says() -> None:
    for value in (0.005, 0.07, 3.0):
        assert 1 / Temperature(value, learn=False)().item() == pytest.approx(value)


def test_a_learnt_temperature_starts_within_its_bound_and_comes_back_from_it() -> None:
    with pytest.raises(UserError, match=r"temperature=0\.005 is below 0\.01, the bound of"):
        Temperature(0.005, learn=True)
    learnt = Temperature(0.01, learn=True)
    learnt.log_scale.data += 1  # a step too far
    assert learnt().item() == pytest.approx(MAX_SCALE)
    learnt().backward()
    assert learnt.log_scale.grad is not None
    assert learnt.log_scale.grad.item() == pytest.approx(MAX_SCALE)


def test_matryoshka_dims_of_a_narrower_model_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"matryoshka_dims=\[33\] exceed the embedding's 32 dim"):
        make(matryoshka_dims=[33])
