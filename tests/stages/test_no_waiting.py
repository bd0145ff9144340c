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

from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.loading import FAMILIES, Loaded
from cocoa_pl.stages.base import StageModule
from tests.adapters import low_rank
from tests.stages.steps import STAGES, Rows, batches_of, make_module, make_rows

# Of the other families' towers each stage reads the same.
CASES = [("qwen2_vl", stage) for stage in STAGES]
CASES += [(family, "warmup") for family in sorted(FAMILIES) if family != "qwen2_vl"]
every_case = pytest.mark.parametrize(
    ("family", "stage"), CASES, indirect=["family"], scope="session"
)


class Nowhere(torch.autocast):
    """Autocast knows no such device, and has nothing to do in float32."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return nullcontext()


@pytest.fixture
def make(
    load_tiny: Callable[..., Loaded], processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StageModule]:
    """Of a stage with DoRA in both towers."""
    adapter = low_rank(dropout=0.1)

    def module(stage: str) -> Any:
        monkeypatch.setattr(torch, "autocast", Nowhere)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        return make_module(stage, adapter(load_tiny().backbone), processor, token_budget=40)

    return module


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> dict[str, Rows]:
    return {stage: make_rows(stage, 5, processor, make_item, images=2) for stage in STAGES}


@every_case
def test_a_training_step_is_queued_without_a_wait(
    stage: str, make: Callable[..., StageModule], rows: dict[str, Rows]
) -> None:
    module = make(stage).train()
    batches = batches_of(module, rows[stage])
    assert len(batches) > 2
    module.to("meta")
    metrics = module.gradients(batches)
    assert "gradient_norm" in metrics
    assert all(value.device.type == "meta" for value in metrics.values())
    unused = {n for n, p in module.named_parameters() if p.requires_grad and p.grad is None}
    assert unused <= {"backbone.model.lm_head.weight"}  # contrast has no use for it


@every_case
def test_neither_does_validation_wait(
    stage: str, make: Callable[..., StageModule], rows: dict[str, Rows]
) -> None:
    module = make(stage).eval()
    batches = batches_of(module, rows[stage], validating=True)
    module.to("meta")
    with torch.no_grad():
        sums = module.measure(batches)
    assert {value.device.type for value in sums.values()} == {"meta"}


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero])
def test_reading_such_a_tensor_fails(read: Callable[[Tensor], object]) -> None:
    """The tests above can fail."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))
