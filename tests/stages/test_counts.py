"""The cost of a step, counted: the gate against work that creeps back in.

Times are noise on a busy machine; operations, rows and bytes are not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cocoa_pl
from cocoa_pl import losses
from cocoa_pl.data.batch import Batch
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.loading import Loaded
from cocoa_pl.planning.counting import Counting
from cocoa_pl.stages.base import StageModule
from tests.stages.steps import STAGES, Rows, batches_of, make_module, make_rows

PACKAGE = Path(cocoa_pl.__file__).parent
CONTRAST = {"learn_temperature": False, "symmetric": False, "matryoshka_dims": ()}
Make = Callable[..., StageModule]
MakeRows = Callable[[str, int], Rows]


@pytest.fixture
def make(load_tiny: Callable[..., Loaded], processor: Processor) -> Make:
    def module(stage: str) -> StageModule:
        backbone = load_tiny().backbone.requires_grad_(True)
        choices: dict[str, Any] = CONTRAST if stage == "contrast" else {}
        return make_module(stage, backbone, processor, **choices)

    return module


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> MakeRows:
    return lambda stage, count: make_rows(stage, count, processor, make_item)


def head_rows(module: StageModule, batches: list[Batch]) -> list[int]:
    """How many states the vocabulary head sees in a training step, call by call."""
    seen: list[int] = []
    head = module.backbone.stock.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    module.accumulate(batches)
    handle.remove()
    return seen


def num_tokens(batches: list[Batch]) -> int:
    return sum(batch.num_tokens for batch in batches)


@pytest.mark.parametrize("stage", ["reconstruct"])
def test_the_vocabulary_head_sees_hidden_tokens_only(
    stage: str, make: Make, rows: MakeRows
) -> None:
    module = make(stage)
    batches = batches_of(module, rows(stage, 8))
    seen = head_rows(module, batches)
    assert seen == [len(batch.targets) for batch in batches]
    assert 0 < sum(seen) < 0.4 * num_tokens(batches)
    contrast = make("contrast")
    assert head_rows(contrast, batches_of(contrast, rows("contrast", 8))) == []


def test_the_vision_tower_runs_for_batches_with_images_only(make: Make, rows: MakeRows) -> None:
    module, calls = make("contrast"), []
    module.backbone.stock.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    batches = batches_of(module, rows("contrast", 12))
    module.accumulate(batches)
    with_images = sum(len(batch.grids) > 0 for batch in batches)
    assert with_images < len(batches)
    assert len(calls) == 2 * with_images - 1  # the first batch's graph is kept


@pytest.mark.parametrize("stage", ["warmup", pytest.param("reconstruct", marks=pytest.mark.slow)])
def test_operations_grow_with_the_tokens_and_not_faster(
    stage: str, make: Make, rows: MakeRows
) -> None:
    counts, tokens = [], []
    for number in (8, 16, 32):
        module = make(stage)
        batches = batches_of(module, rows(stage, number))
        tokens.append(num_tokens(batches))
        with FlopCounterMode(display=False) as counter:
            module.accumulate(batches)
        counts.append(counter.get_total_flops())
    assert tokens[1:] == [2 * tokens[0], 4 * tokens[0]]
    for count, times in zip(counts[1:], (2, 4), strict=True):
        assert count == pytest.approx(times * counts[0], rel=0.03)


def peak(module: StageModule, rows: Rows) -> int:
    batches = batches_of(module, rows)
    module.accumulate(batches)  # gradients are there from now on
    with Counting() as live:
        module.accumulate(batches)
    return live.peak


@pytest.mark.slow
def test_memory_of_rebuilding_does_not_grow_with_the_step(make: Make, rows: MakeRows) -> None:
    for stage in ("warmup", "reconstruct"):
        peaks = [peak(make(stage), rows(stage, n)) for n in (32, 128)]
        assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize("stage", ["reconstruct", "contrast"])
def test_a_training_step_reaches_its_loss_in_six_frames_of_three_files(
    stage: str, make: Make, rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = make(stage), []
    original = losses.cross_entropy

    def traced(*args: Any, **kwargs: Any) -> Any:
        own = [Path(f.filename) for f in traceback.extract_stack() if "cocoa_pl" in f.filename]
        seen.append([file for file in own if file.is_relative_to(PACKAGE)])
        return original(*args, **kwargs)

    monkeypatch.setattr(losses, "cross_entropy", traced)
    batches = batches_of(module, rows(stage, 8))
    monkeypatch.setattr(module, "optimizers", MagicMock())
    monkeypatch.setattr(module, "lr_schedulers", MagicMock())
    monkeypatch.setattr(module, "log_dict", lambda metrics: None)
    monkeypatch.setattr(type(module), "global_step", 0)
    module.training_step(batches, 0)
    assert seen
    for files in seen:
        assert len(files) <= 6
        assert len(set(files)) <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_on_a_gpu_never_waits_for_it(stage: str, make: Make, rows: MakeRows) -> None:
    module = make(stage).to("cuda")
    batches = [batch.pin_memory() for batch in batches_of(module, rows(stage, 12))]
    module.accumulate(batches)  # warm up
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.accumulate(batches)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
