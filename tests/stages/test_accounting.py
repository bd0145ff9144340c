"""A mean over masked tokens is the same whatever the packing, the accumulation and the order."""

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
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages.base import Optimization
from cocoa_pl.stages.reconstruction import ReconstructionModule

EVERYTHING = ("context", "eos", "target")
FULL = Policy("bidirectional", EVERYTHING, EVERYTHING, EVERYTHING, causal=False)
CAUSAL = Policy("causal", EVERYTHING, EVERYTHING, EVERYTHING, causal=True)
BRIDGE = Policy("eos_bridge", ("context", "eos"), EVERYTHING, ("eos", "target"), causal=False)
STAGES: dict[str, tuple[Policy, dict[str, Any]]] = {
    "pretrain": (CAUSAL, {"text_ratio": None, "text_segment": "context", "patch_ratio": 0.0}),
    "warmup": (FULL, {"text_ratio": 0.2, "text_segment": "context", "patch_ratio": 0.5}),
    "reconstruct": (BRIDGE, {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0}),
}
ORDERS = {
    "as given": [0, 1, 2, 3, 4, 5],
    "reversed": [5, 4, 3, 2, 1, 0],
    "mixed": [3, 0, 5, 1, 4, 2],
}

Found = dict[str, Tensor]
Step = Callable[..., Found]


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> list[list[Encoded]]:
    """Texts of different lengths behind none, one or two pictures."""

    def encode(seed: int) -> Encoded:
        item = make_item(seed, images=seed % 3)
        target = make_item(100 + seed).text
        return processor.encode(item, target, key=item.key, seed=seed, row_id=f"toy row {seed}")

    return [[encode(seed)] for seed in range(6)]


@pytest.fixture
def step(load_tiny: Callable[..., Loaded], processor: Processor) -> Step:
    """Metrics and gradients of one step, by name."""

    def run(name: str, batches: list[Rows], *, token_budget: int) -> Found:
        policy, choices = STAGES[name]
        backbone = load_tiny().backbone.requires_grad_(True)
        torch.manual_seed(0)  # of the image decoder
        module = ReconstructionModule(
            backbone,
            **choices,
            patch_weight=0.5,
            processor=processor,
            policy=policy,
            optimization=Optimization(
                lr=1e-3,
                weight_decay=0.0,
                betas=(0.9, 0.98),
                schedule="linear",
                warmup_steps=0,
                clip_norm=1.0,
            ),
            token_budget=token_budget,
            steps=1,
            seed=0,
        )
        module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
        metrics: Found = {}
        for batch in batches:
            metrics = module.accumulate(module.preparation(validating=False)(batch))
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        return {f"metric {name}": value for name, value in metrics.items()} | gradients

    return run


def assert_close(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("token_budget", [1, 40, 90])
def test_cutting_a_batch_changes_neither_loss_nor_gradients(
    name: str, token_budget: int, rows: list[list[Encoded]], step: Step
) -> None:
    whole = step(name, [collate(rows)], token_budget=100_000)
    assert whole["metric loss"] > 0
    assert_close(step(name, [collate(rows)], token_budget=token_budget), whole)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_rows_changes_neither_loss_nor_gradients(
    name: str, order: str, rows: list[list[Encoded]], step: Step
) -> None:
    whole = step(name, [collate(rows)], token_budget=60)
    shuffled = collate([rows[place] for place in ORDERS[order]])
    assert_close(step(name, [shuffled], token_budget=60), whole)


def test_every_token_weighs_the_same_not_every_batch(rows: list[list[Encoded]], step: Step) -> None:
    """The comparison above can fail: a mean of the chunks' means is something else."""
    whole = step("reconstruct", [collate(rows)], token_budget=60)
    means = [step("reconstruct", [collate([row])], token_budget=60) for row in rows]
    average = torch.stack([found["metric loss"] for found in means]).mean()
    assert not torch.isclose(average, whole["metric loss"], rtol=1e-3)


def test_a_chunk_without_pictures_costs_a_batch_nothing(
    rows: list[list[Encoded]], step: Step
) -> None:
    """Row 0 and row 3 have no picture: as chunks of their own they have nothing to rebuild."""
    texts = collate([rows[0], rows[3]])
    found = step("warmup", [texts], token_budget=1)
    assert found["metric loss_patch"] == 0
    assert found["metric loss"] == found["metric loss_text"] > 0
