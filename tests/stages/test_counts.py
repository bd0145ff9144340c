"""What a step costs, counted: the gate against work that creeps back in.

Times are noise on a busy machine; operations, rows and bytes are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Encoded, Rows
from cocoa_pl.data.datamodule import collate
from cocoa_pl.data.items import Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.live_bytes import LiveBytes
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.reconstruction import ReconstructionModule

ALL = ("context", "eos", "target")
FULL = Policy("bidirectional", ALL, ALL, ALL, causal=False)
BRIDGE = Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), causal=False)
CONTRAST: dict[str, Any] = {
    "temperature": 0.1,
    "learn_temperature": False,
    "symmetric": False,
    "mask_false_negatives": True,
    "matryoshka_dims": (),
    "similarity_block": 16,
    "keep_gib": 0,
}
WARMUP = {"text_ratio": 0.3, "text_segment": "context", "patch_ratio": 0.5, "patch_weight": 0.5}
REBUILD = {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0, "patch_weight": 0.0}
STAGES: dict[str, tuple[type[StageModule[Any]], Policy, dict[str, Any]]] = {
    "contrast": (ContrastiveModule, FULL, CONTRAST),
    "warmup": (ReconstructionModule, FULL, WARMUP),
    "reconstruct": (ReconstructionModule, BRIDGE, REBUILD),
}
Make = Callable[..., StageModule[Any]]


@pytest.fixture
def make(load_tiny: Callable[..., Loaded], processor: Processor) -> Make:
    def module(stage: str, *, token_budget: int = 60) -> StageModule[Any]:
        kind, policy, choices = STAGES[stage]
        torch.manual_seed(0)
        made = kind(
            load_tiny().backbone.requires_grad_(True),
            processor=processor,
            policy=policy,
            optimization=Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
            token_budget=token_budget,
            steps=1,
            seed=0,
            **choices,
        )
        made.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
        return made

    return module


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Callable[..., Rows]:
    """So many rows; rows that have the same number modulo four are of the same size."""

    def encode(seed: int, images: int, target: str | None = None) -> Encoded:
        item = make_item(seed % 4, images=images)
        return processor.encode(item, target, key=seed, seed=seed, row_id=f"row {seed}")

    def make(stage: str, count: int) -> Rows:
        if stage == "contrast":
            return collate([[encode(n, 1), encode(1000 + n, 0)] for n in range(count)])
        target = make_item(77).text
        return collate([[encode(n, 1, target)] for n in range(count)])

    return make


def run(module: StageModule[Any], rows: Rows) -> Any:
    step = module.preparation(validating=False)(rows)
    module.accumulate(step)
    return step


def head_rows(module: StageModule[Any], rows: Rows) -> tuple[list[int], Any]:
    """How many states the vocabulary head saw, call by call."""
    seen: list[int] = []
    head = module.backbone.stock.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    step = run(module, rows)
    handle.remove()
    return seen, step


@pytest.mark.parametrize("stage", ["warmup", "reconstruct"])
def test_the_vocabulary_head_sees_hidden_tokens_only(
    stage: str, make: Make, rows: Callable[..., Rows]
) -> None:
    seen, step = head_rows(make(stage), rows(stage, 8))
    assert seen == [len(puzzle.targets) for puzzle in step.chunks]
    assert sum(seen) < 0.4 * step.num_tokens


def test_contrast_has_no_use_for_the_vocabulary_head(make: Make, rows: Callable[..., Rows]) -> None:
    module = make("contrast")
    assert head_rows(module, rows("contrast", 8))[0] == []
    with torch.no_grad():
        step = module.preparation(validating=True)(rows("contrast", 8))
        seen: list[int] = []
        head = module.backbone.stock.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        module.measure(step)
    assert seen == []


def test_the_vision_tower_runs_for_chunks_with_images_only(
    make: Make, rows: Callable[..., Rows]
) -> None:
    module, calls = make("contrast"), []
    module.backbone.stock.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    step = run(module, rows("contrast", 12))
    with_images = sum(len(chunk.batch.grids) > 0 for chunk in step.chunks)
    assert with_images < len(step.chunks)
    assert len(calls) == 2 * with_images - 1  # the first chunk's graph is kept


def test_no_token_is_padding(make: Make, rows: Callable[..., Rows]) -> None:
    module, tokens = make("contrast"), []
    layer = module.backbone.stock.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    step = run(module, rows("contrast", 12))
    first = step.chunks[0].batch.num_tokens
    assert sum(tokens) == 2 * step.num_tokens - first


def flops(module: StageModule[Any], rows: Rows) -> int:
    with FlopCounterMode(display=False) as counter:
        run(module, rows)
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", ["warmup", "reconstruct"])
def test_operations_grow_with_the_tokens_and_not_faster(
    stage: str, make: Make, rows: Callable[..., Rows]
) -> None:
    counts = [flops(make(stage), rows(stage, n)) for n in (8, 16, 32)]
    tokens = [rows(stage, n).batch.num_tokens for n in (8, 16, 32)]
    assert tokens[1:] == [2 * tokens[0], 4 * tokens[0]]
    for count, times in zip(counts[1:], (2, 4), strict=True):
        assert count == pytest.approx(times * counts[0], rel=0.02)


def peak(module: StageModule[Any], rows: Rows) -> int:
    step = module.preparation(validating=False)(rows)
    module.accumulate(step)  # gradients are there from now on
    with LiveBytes() as live:
        module.accumulate(step)
    return live.peak


def test_memory_of_contrast_grows_with_the_embeddings_alone(
    make: Make, rows: Callable[..., Rows]
) -> None:
    """Chunks and similarities stay the same size: what grows is vectors and keys."""
    few, many = (peak(make("contrast"), rows("contrast", n)) for n in (16, 64))
    width = make("contrast").backbone.hidden_size
    # Unit vectors of both sides and their gradients, in the order of chunks and of rows, and the
    # bookkeeping of each sample.
    a_row = 2 * (8 * width * 4 + 200)
    assert many - few < (64 - 16) * a_row
    assert many < 1.2 * few


def test_memory_of_rebuilding_does_not_grow_with_the_batch(
    make: Make, rows: Callable[..., Rows]
) -> None:
    for stage in ("warmup", "reconstruct"):
        peaks = [peak(make(stage), rows(stage, n)) for n in (8, 32)]
        assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_on_a_gpu_never_waits_for_it(
    stage: str, make: Make, rows: Callable[..., Rows]
) -> None:
    module = make(stage).to("cuda")
    step = module.preparation(validating=False)(rows(stage, 12)).pin_memory()
    module.accumulate(step)  # warm up
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.accumulate(step)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
