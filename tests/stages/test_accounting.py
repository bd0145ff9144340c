"""A mean over masked tokens is the same whatever the packing and the accumulation; dummy samples,
which give ranks with sharded parameters equally many passes, are in none.
"""

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
from tests.stages.steps import (
    STAGES,
    Found,
    Rows,
    assert_close,
    batches_of,
    make_module,
    make_rows,
    step,
)

GENERATIVE = ["pretrain", "warmup", "reconstruct"]
Step = Callable[..., Found]


@pytest.fixture(scope="module")
def rows_of(processor: Processor, make_item: Callable[..., Item]) -> Callable[[str], Rows]:
    """Texts of different lengths with none, one or two pictures."""
    return lambda stage: make_rows(stage, 6, processor, make_item, images=2)


@pytest.fixture(scope="module")
def rows(rows_of: Callable[[str], Rows]) -> Rows:
    return rows_of("warmup")


@pytest.fixture
def run(load_tiny: Callable[..., Loaded], processor: Processor) -> Step:
    def one(stage: str, rows: Rows, *, token_budget: int) -> Found:
        backbone = load_tiny().backbone.requires_grad_(True)
        return step(make_module(stage, backbone, processor, token_budget=token_budget), [rows])

    return one


@pytest.mark.parametrize("stage", GENERATIVE)
@pytest.mark.parametrize("token_budget", [1, 90])
def test_cutting_a_step_changes_neither_loss_nor_gradients(
    stage: str, token_budget: int, rows: Rows, run: Step
) -> None:
    whole = run(stage, rows, token_budget=100_000)
    assert whole["metric loss"] > 0
    assert_close(run(stage, rows, token_budget=token_budget), whole)


def test_every_token_weighs_the_same_not_every_batch(rows: Rows, run: Step) -> None:
    """The comparison above can fail: a mean of the batches' means is something else."""
    whole = run("reconstruct", rows, token_budget=60)
    means = [run("reconstruct", [row], token_budget=60) for row in rows]
    average = torch.stack([found["metric loss"] for found in means]).mean()
    assert not torch.isclose(average, whole["metric loss"], rtol=1e-3)


def test_a_batch_without_pictures_costs_a_step_nothing(rows: Rows, run: Step) -> None:
    """Row 0 and row 3 have no picture: as batches of their own they have nothing to rebuild."""
    found = run("warmup", [rows[0], rows[3]], token_budget=1)
    assert found["metric loss_patch"] == 0
    assert found["metric loss"] == found["metric loss_text"] > 0


# --- Dummy samples ---------------------------------------------------------------------------


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
    rows_of: Callable[[str], Rows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*, dummies: bool) -> Found:
        backbone = load_tiny().backbone.requires_grad_(True)
        module = make_module(stage, backbone, processor, token_budget=30)
        if dummies:  # another rank has images everywhere and two batches more
            module._dummies = module._make_dummies()
            another_has(monkeypatch, *[True] * 9, False)
        metrics = module.accumulate(batches_of(module, rows_of(stage)))
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        with torch.no_grad():
            measured = module.measure(batches_of(module, rows_of(stage), validating=True))
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
