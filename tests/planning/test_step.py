"""A planned step is the real one: the same operations, and the peak of a step on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cocoa_pl.planning
from cocoa_pl.data.batch import Batch
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.adapters import FullTuning, LowRank
from cocoa_pl.models.loading import FAMILIES, Loaded
from cocoa_pl.models.qwen_vl import Qwen2VLBackbone
from cocoa_pl.planning.counting import ATTENTION, Counting
from cocoa_pl.planning.step import BATCH, OPTIMIZER, WEIGHTS, Lengths, as_on_gpu, run_step
from cocoa_pl.stages.base import StageModule
from tests.stages.steps import STAGES, batches_of, make_module, make_rows

ADAPTERS: dict[str, Any] = {
    "full": FullTuning(),
    "dora": LowRank(
        rank=2,
        alpha=4,
        dropout=0.1,
        init="gaussian",
        use_dora=True,
        target_modules=[r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"],
        lean_dora=True,
        dropout_on_base=True,
    ),
}
Made = tuple[StageModule, list[Batch]]
Make = Callable[..., Made]


@pytest.fixture
def make(
    load_tiny: Callable[..., Loaded], processor: Processor, make_item: Callable[..., Item]
) -> Make:
    """A stage around a tiny model, and several batches of a step."""

    def stage(name: str, *, adapter: str = "full", checkpointing: bool = False) -> Made:
        backbone = ADAPTERS[adapter](load_tiny(gradient_checkpointing=checkpointing).backbone)
        module = make_module(name, backbone, processor, token_budget=40).train()
        return module, batches_of(module, make_rows(name, 7, processor, make_item))

    return stage


def second_step(module: StageModule, batches: list[Batch]) -> Counting:
    """A real step, when the optimizer has its state."""
    [optimizer], _ = module.configure_optimizers()
    for _ in range(2):
        optimizer.zero_grad()
        with Counting() as counting:
            counting.hold(chain(module.parameters(), module.buffers()), WEIGHTS)
            states = chain.from_iterable(one.values() for one in optimizer.state.values())
            counting.hold(states, OPTIMIZER)
            module.gradients(batches)
            optimizer.step()
    return counting


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True, scope="session")
@pytest.mark.parametrize(
    ("stage", "adapter", "checkpointing"),
    [
        ("contrast", "full", False),
        ("contrast", "dora", True),
        ("warmup", "full", True),
        pytest.param("warmup", "dora", False, marks=pytest.mark.slow),
        pytest.param("reconstruct", "full", False, marks=pytest.mark.slow),
        pytest.param("pretrain", "dora", True, marks=pytest.mark.slow),
    ],
)
def test_a_planned_step_is_the_real_one(
    stage: str, adapter: str, checkpointing: bool, make: Make
) -> None:
    """Operations to the last one; memory at the peak to 2 %."""
    module, batches = make(stage, adapter=adapter, checkpointing=checkpointing)
    assert len(batches) > 2
    real = second_step(module, batches)
    flops = FlopCounterMode(display=False)
    if not checkpointing:  # its hooks do not bear recomputed graphs
        with flops:
            module.gradients(batches)
    planned = run_step(module, batches)
    found = planned.count.by_operator()
    assert planned.count.total.flops == real.result.total.flops
    attention = {str(packet) for packet in ATTENTION}
    plain = sum(cost.flops for name, cost in found.items() if name not in attention)
    assert checkpointing or plain == flops.get_total_flops() > 0
    memory = sum(size for kind, size in planned.memory.items() if kind != BATCH)
    assert memory == pytest.approx(real.peak, rel=0.02)
    for kind in (WEIGHTS, OPTIMIZER):
        assert planned.memory[kind] == real.at_peak[kind]


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        pytest.param(*one, marks=[pytest.mark.slow] * (one != ("qwen3_vl", "full")))
        for one in product(sorted(FAMILIES), ADAPTERS)
    ],
    indirect=["family"],
    scope="session",
)
def test_calls_that_are_alike_cost_what_they_cost_one_by_one(adapter: str, make: Make) -> None:
    """Every operation as often, and memory at the peak to 2 %."""
    module, batches = make("contrast", adapter=adapter, checkpointing=True)
    assert len(batches) > 2
    once, whole = (run_step(module, batches, repeats=repeats) for repeats in (True, False))
    assert once.count.calls == whole.count.calls
    assert sum(once.memory.values()) == pytest.approx(sum(whole.memory.values()), rel=0.02)


class MadeUp(StageModule):
    """A stage that plan has never heard of: it asks for states of equal length."""

    def accumulate(self, batches: Any) -> dict[str, Tensor]:
        for batch in batches:
            states = self.backbone(batch.to(self.device))
            self.manual_backward((states @ states.T).square().mean())
        return {"targets": torch.ones(())}

    measure = means = pictures = summary_line = accumulate  # type: ignore[assignment]


class MadeUpFamily(Qwen2VLBackbone):
    """A family that plan has never heard of: each of its blocks runs twice."""

    def forward(self, batch: Batch, pixels: Tensor | None = None) -> Tensor:
        return super().forward(batch, pixels) + super().forward(batch, pixels)


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True, scope="session")
def test_a_new_stage_of_a_new_family_is_planned(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "made_up", (MadeUp, STAGES["contrast"][1], {}))
    module, batches = make("made_up")
    states = [batch.num_tokens**2 * module.backbone.hidden_size for batch in batches]
    plain = run_step(module, batches).count.total.flops
    module.backbone.__class__ = MadeUpFamily
    twice = run_step(module, batches).count.total.flops
    own = sum(2 * 3 * number for number in states)  # of the loss, forward and backward
    assert twice - own == 2 * (plain - own)


def test_plan_knows_no_names() -> None:
    """Of families, stages, their classes and losses."""
    folder = Path(cocoa_pl.planning.__file__).parent
    code = "\n".join(path.read_text() for path in folder.glob("*.py"))
    names = {*FAMILIES, *STAGES}
    names |= {cls.__name__ for cls, *_ in STAGES.values()} | {c.__name__ for c in FAMILIES.values()}
    names |= {"info_nce", "masked_next_token", "rebuilt_patches", "ImageDecoder", "LeanDora"}
    assert [name for name in sorted(names) if name in code] == []


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True, scope="session")
def test_a_gpu_is_planned_and_not_touched(
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    make_item: Callable[..., Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its kernels, its dropout and its autocast, on whatever machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a GPU was asked"))
    backbone = ADAPTERS["dora"](load_tiny().backbone)
    backbone.compute_dtype, backbone.kernel = torch.bfloat16, "auto"
    with as_on_gpu():
        module = make_module("contrast", backbone, processor, token_budget=40).train()
        batches = batches_of(module, make_rows("contrast", 5, processor, make_item))
        step = run_step(module, batches)
    found = step.count.by_operator()
    assert {"torch_attn._varlen_attn", "aten.native_dropout"} <= found.keys()
    assert not any("scaled_dot_product" in name or "bernoulli" in name for name in found)
    dtypes = {c.dtype for c in step.count.calls if c.operator == "aten.native_layer_norm"}
    assert dtypes == {"float32"}
    assert any(c.dtype == "bfloat16" for c in step.count.calls if c.operator == "aten.mm")


def test_an_assumed_row(processor: Processor) -> None:
    lengths = Lengths(
        24, images_per_query=0.25, images_per_positive=1.5, negatives=1, image_tokens=6
    )
    image = lengths.image(processor)
    assert processor.count_visual_tokens(*image.size) == 6
    pairs = [lengths.pair(row, image) for row in range(8)]
    assert sum(len(pair.query.media) for pair in pairs) == 2  # fractions spread evenly
    assert [len(pair.positive.media) for pair in pairs] == [1, 2] * 4
    assert [len(pair.negatives) for pair in pairs] == [1] * 8
    largest = Lengths(24, 1, 0, 0, image_tokens=None).image(processor)
    assert processor.count_visual_tokens(*largest.size) == 4  # 2 x 2 of at most 6
