"""Planned bytes are those of a real step: peaks of live storages, and of a real optimizer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from benchmarks.counting import LiveBytes
from cocoa_pl.planning.activations import ByteWidths, kept_by_chunk
from cocoa_pl.planning.memory import (
    ACTIVATIONS,
    BUFFERS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    ChunkLoad,
    Setup,
    memory_by_part,
    static_memory,
)

MakeSmall = Callable[..., Any]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def measured_peak(small: Any) -> int:
    """Bytes of a step beside weights and optimizer state."""
    with LiveBytes() as live:
        small.step()
    return live.peak + max(batch.patches.nbytes for batch in small.batches)


def setup_of(small: Any, dtype: torch.dtype, **changes: Any) -> Setup:
    values: dict[str, Any] = {
        "shape": small.shape,
        "adapter": small.tuning.adapter,
        "width": dtype.itemsize,
        "checkpointing": small.checkpointing,
        "sharded": False,
        "gpus": 1,
        "kernel": "sdpa",
        "on_gpu": False,
    }
    return Setup(**(values | changes))


def load_of(small: Any) -> ChunkLoad:
    return ChunkLoad(
        works=small.works,
        decoder=small.decoder,
        cached=small.contrasts and len(small.works) > 1,
        rows=small.queries,
        candidates=small.candidates,
    )


def check_peak(make_small: MakeSmall, dtype: torch.dtype, stage: str, **choices: Any) -> None:
    small = make_small(stage, dtype=dtype, rows=8, **choices)
    parts = memory_by_part(setup_of(small, dtype), load_of(small))
    planned = sum(size for part, size in parts.items() if part not in (WEIGHTS, OPTIMIZER))
    assert planned == pytest.approx(measured_peak(small), rel=0.1)


@pytest.mark.parametrize(
    ("stage", "dtype", "choices"),
    [
        ("warmup", BFLOAT16, {"token_budget": 330}),
        pytest.param("contrast", FLOAT32, {"token_budget": 330}, marks=pytest.mark.slow),
        pytest.param("contrast", BFLOAT16, {"family": "qwen3_vl"}, marks=pytest.mark.slow),
    ],
    ids=["warmup", "contrast", "qwen3_vl"],
)
def test_a_step_takes_the_planned_bytes(
    stage: str, dtype: torch.dtype, choices: dict[str, Any], make_small: MakeSmall
) -> None:
    check_peak(make_small, dtype, stage, adapter="dora", checkpointing=True, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["pretrain", "warmup", "reconstruct", "contrast"])
def test_everything_takes_the_planned_bytes(
    stage: str, dtype: torch.dtype, family: str, make_small: MakeSmall
) -> None:
    for adapter, checkpointing, budget in product(
        ["none", "lora", "dora", "lean"], [False, True], [330, 10_000]
    ):
        check_peak(
            make_small,
            dtype,
            stage,
            family=family,
            adapter=adapter,
            checkpointing=checkpointing,
            token_budget=budget,
        )


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "qwen2_vl")) for f in FAMILIES]
)
@pytest.mark.parametrize("adapter", ["none", "lora", "dora", "lean"])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(FLOAT32, marks=pytest.mark.slow), BFLOAT16],
    ids=["float32", "bfloat16"],
)
def test_what_a_forward_pass_keeps_is_known_to_two_per_cent(
    dtype: torch.dtype, adapter: str, family: str, make_small: MakeSmall
) -> None:
    small = make_small("contrast", family=family, adapter=adapter, dtype=dtype)
    weight = 4 if adapter == "none" else dtype.itemsize
    kept = kept_by_chunk(
        small.shape,
        small.tuning,
        ByteWidths(product=dtype.itemsize, weight=weight, on_gpu=False),
        small.works[0],
        checkpointing=False,
        decoder=False,
    )
    (batch,) = small.batches
    with LiveBytes() as live:
        embeddings = small.module.backbone.embed(batch)
        left = live.now
    assert embeddings.requires_grad
    assert kept.total == pytest.approx(left, rel=0.02)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stage", "adapter"), [("warmup", "none"), ("warmup", "dora"), ("reconstruct", "lora")]
)
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step(
    stage: str, adapter: str, dtype: torch.dtype, make_small: MakeSmall
) -> None:
    small = make_small(stage, adapter=adapter, dtype=dtype)
    trained = [p for p in small.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    small.step()
    optimizer.step()
    found = static_memory(setup_of(small, dtype), decoder=small.decoder)
    assert found[WEIGHTS] == sum(p.nbytes for p in small.module.parameters())
    assert found[GRADIENTS] == sum(p.grad.nbytes for p in trained)
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert found[OPTIMIZER] == sum(moment.nbytes for moment in moments)


def test_sharding_splits_what_stays_and_gathers_blocks(make_small: MakeSmall) -> None:
    small = make_small("contrast")
    one, load = setup_of(small, FLOAT32), load_of(small)
    alone = memory_by_part(one, load)
    copied = memory_by_part(one.with_changes(gpus=4), load)
    split = memory_by_part(one.with_changes(gpus=4, sharded=True), load)
    for part in (WEIGHTS, GRADIENTS, OPTIMIZER):
        assert copied[part] == alone[part]
        assert split[part] == alone[part] // 4
    assert copied[BUFFERS] == alone[GRADIENTS]  # all in one bucket
    shape = small.shape
    outside = shape.parameters - sum(
        b.count * b.parameters for b in (shape.text, shape.vision.block)
    )
    assert split[GATHERED] > 4 * outside


@pytest.mark.parametrize(
    ("change", "part"),
    [({"checkpointing": True}, ACTIVATIONS), ({"width": 2}, ACTIVATIONS)],
)
def test_what_should_save_memory_does(
    change: dict[str, Any], part: str, make_small: MakeSmall
) -> None:
    small = make_small("contrast", rows=8)
    setup, load = setup_of(small, FLOAT32), load_of(small)
    before, after = memory_by_part(setup, load), memory_by_part(setup.with_changes(**change), load)
    assert after[part] < 0.8 * before[part]
