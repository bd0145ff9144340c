"""Dummy samples, which give ranks with sharded parameters equally many passes, are in no loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cocoa_pl.data.batch import Batch
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages import base
from tests.stages.steps import STAGES, Found, Rows, assert_close, batches_of, make_module, make_rows


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Callable[[str], Rows]:
    """Rows with and without pictures."""
    return lambda stage: make_rows(stage, 4, processor, make_item, images=2)


def another_has(monkeypatch: pytest.MonkeyPatch, *images: bool) -> None:
    """As if another rank had such batches."""
    monkeypatch.setattr(base, "all_objects", lambda mine: [mine, list(images)])


def test_a_rank_follows_the_others(
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    make_samples: Callable[..., list[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make_module("contrast", load_tiny().backbone, processor, token_budget=1)
    own: list[Batch] = module.collator(validating=False)([[s] for s in make_samples((1, 0, 0))])
    assert [len(batch.grids) for batch in own] == [1, 0, 0]
    assert module.aligned(own) == own  # nothing is sharded
    module._dummies = module._make_dummies()
    another_has(monkeypatch, True)
    assert module.aligned(own) == own
    another_has(monkeypatch, False, True, False, True, False)
    found = module.aligned(own)
    assert [len(batch.grids) for batch in found] == [1, 1, 0, 1, 0]
    assert [len(batch.visual_rows) for batch in found] == [len(own[0].visual_rows), 0, 0, 0, 0]
    assert [len(batch.bottleneck_rows) for batch in found] == [1, 1, 1, 0, 0]
    assert torch.equal(found[1].input_ids, own[1].input_ids)


@pytest.mark.parametrize("stage", STAGES)
def test_dummies_are_in_no_loss_gradient_or_measure(
    stage: str,
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    rows: Callable[[str], Rows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*, dummies: bool) -> Found:
        backbone = load_tiny().backbone.requires_grad_(True)
        module = make_module(stage, backbone, processor, token_budget=30)
        if dummies:  # another rank has images everywhere and two batches more
            module._dummies = module._make_dummies()
            another_has(monkeypatch, *[True] * 9, False)
        metrics = module.accumulate(batches_of(module, rows(stage)))
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        with torch.no_grad():
            measured = module.measure(batches_of(module, rows(stage), validating=True))
        return {**{f"train {n}": v for n, v in metrics.items()}, **gradients, **measured}

    plain = run(dummies=False)
    assert plain["train loss"] > 0
    assert_close(run(dummies=True), plain)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True, scope="session")
def test_an_unread_image_changes_no_state(
    family: str,
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    make_samples: Callable[..., list[object]],
) -> None:
    module = make_module("contrast", load_tiny().backbone, processor)
    text, image = (
        module.collator(validating=False)([[s] for s in make_samples((images,))])[0]
        for images in (0, 1)
    )
    lent = replace(text, patches=image.patches, grids=image.grids, vision=image.vision)
    with torch.no_grad():
        assert torch.equal(module.backbone(lent), module.backbone(text))
