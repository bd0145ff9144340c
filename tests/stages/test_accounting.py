"""A mean over masked tokens is the same whatever the packing, the accumulation and the order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.loading import Loaded
from tests.stages.steps import Found, Rows, assert_close, make_module, make_rows, step

GENERATIVE = ["pretrain", "warmup", "reconstruct"]
Step = Callable[..., Found]


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Rows:
    """Texts of different lengths behind none, one or two pictures."""
    return make_rows("warmup", 6, processor, make_item, images=2)


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


@pytest.mark.parametrize("stage", ["warmup"])
def test_the_order_of_rows_changes_neither_loss_nor_gradients(
    stage: str, rows: Rows, run: Step
) -> None:
    whole = run(stage, rows, token_budget=60)
    for order in ([5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        assert_close(run(stage, [rows[place] for place in order], token_budget=60), whole)


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
