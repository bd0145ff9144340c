"""A plan's verdict on memory, and the changes that it proposes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from cocoa_pl.data.examples import PairExamples
from cocoa_pl.models.published import KNOWN
from cocoa_pl.planning.families import model_shape
from cocoa_pl.planning.memory import Setup
from cocoa_pl.planning.samples import Lengths
from cocoa_pl.planning.stage_plan import StagePlan
from cocoa_pl.planning.tuning import Adapter
from cocoa_pl.planning.verdict import Hardware, Remedy, remedies
from cocoa_pl.stages.base import Optimization
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.recipe import Stage

LORA = Adapter(8, 0.1, False, False, True, (r".*_proj",))
TFLOPS = {"bfloat16": 1000.0, "float32": 50.0}
MakePlan = Callable[..., StagePlan]


def gpu(memory_gib: float) -> Hardware:
    return Hardware(f"gpu{memory_gib:g}", memory_gib, TFLOPS, context_gib=1.0, slack=0.1)


@pytest.fixture
def make_plan(lengths: Lengths, policies: Any) -> MakePlan:
    """Contrast of 64 pairs on Qwen2-VL-2B."""
    stage = Stage(
        name="contrast",
        module=partial(ContrastiveModule, matryoshka_dims=[]),
        make_samples=PairExamples(max_negatives=0),
        describing=False,
        mixing=None,  # type: ignore[arg-type]
        max_rows_per_subset=None,
        batch_size=64,
        validation_batch_size=1,
        steps=100,
        epochs=None,
        validate_every=10,
        policy=policies["bidirectional"],
        optimization=Optimization(1e-5, 0.0, (0.9, 0.98), "linear", 0, 1.0),
        token_budget=8192,
    )
    setup = Setup(
        shape=model_shape(KNOWN["Qwen/Qwen2-VL-2B-Instruct"].config()),
        adapter=LORA,
        width=2,
        checkpointing=False,
        sharded=False,
        gpus=1,
        kernel="sdpa",
    )

    def make(**changes: Any) -> StagePlan:
        return StagePlan(stage, replace(setup, **changes), lengths, 4096, None)

    return make


def needed(plan: StagePlan) -> float:
    return sum(gpu(1).needed(plan.memory).values())


def changed(plan: StagePlan, remedy: Remedy) -> StagePlan:
    """The plan after what a remedy says, read from its words."""
    values = dict(word.split("=") for word in remedy.overrides)
    setup = plan.setup
    if values.get("trainer") == "fsdp":
        setup = replace(setup, sharded=True)
    if "model.gradient_checkpointing" in values:
        setup = replace(setup, checkpointing=True)
    if values.get("adapter") == "lora":
        setup = replace(setup, adapter=LORA)
    if "model.dtype" in values:
        setup = replace(setup, width=2)
    setup = replace(setup, gpus=int(values.get("gpus", setup.gpus)))
    return plan.with_changes(setup, token_budget=int(values.get("stage.token_budget", 8192)))


def test_a_smaller_token_budget_is_the_smallest_change(make_plan: MakePlan) -> None:
    plan = make_plan()
    hardware = gpu(0.8 * needed(plan))
    assert not hardware.fits(plan)
    first = remedies([plan], hardware, lora=LORA, others=[])[0]
    assert first.overrides == ("stage.token_budget=2048",) or first.overrides == (
        "stage.token_budget=1024",
    )
    assert hardware.fits(changed(plan, first))
    larger = plan.with_changes(plan.setup, token_budget=4096)
    assert not hardware.fits(larger)


@pytest.mark.parametrize(
    ("changes", "memory_gib"),
    [
        ({"adapter": None}, 30.0),
        ({"adapter": None, "gpus": 4}, 30.0),
        ({"width": 4}, 8.0),
        ({}, 6.5),
        ({}, 5.7),
    ],
)
def test_every_remedy_fits(changes: dict[str, Any], memory_gib: float, make_plan: MakePlan) -> None:
    plan, hardware = make_plan(**changes), gpu(memory_gib)
    assert not hardware.fits(plan)
    found = remedies([plan], hardware, lora=LORA, others=[gpu(24), gpu(500)])
    assert found
    for remedy in found:
        if remedy.overrides[0].startswith("hardware="):
            assert remedy.overrides == ("hardware=gpu500",) or gpu(24).fits(plan)
        else:
            assert hardware.fits(changed(plan, remedy)), remedy


def test_full_tuning_is_sharded_or_left(make_plan: MakePlan) -> None:
    plan = make_plan(adapter=None, gpus=4, checkpointing=True)
    words = [r.overrides for r in remedies([plan], gpu(30), lora=LORA, others=[gpu(80)])]
    assert words == [("trainer=fsdp",), ("adapter=lora",), ("hardware=gpu80",)]


def test_one_gpu_too_small_for_the_weights_asks_for_more(make_plan: MakePlan) -> None:
    plan = make_plan(adapter=None, checkpointing=True)
    first = remedies([plan], gpu(24), lora=LORA, others=[])[0]
    assert first.overrides[:2] == ("gpus=2", "trainer=fsdp")


def test_nothing_helps_where_nothing_can(make_plan: MakePlan) -> None:
    assert remedies([make_plan()], gpu(1.5), lora=LORA, others=[]) == []


def test_time_follows_operations_peak_and_share(make_plan: MakePlan) -> None:
    plan = make_plan()
    operations = sum(cost.total for part, cost in plan.costs.items() if part != "similarities")
    seconds = plan.seconds(TFLOPS, 0.5)
    assert seconds == pytest.approx(operations / (1000e12 * 0.5), rel=1e-4)
    assert make_plan(gpus=2).seconds(TFLOPS, 0.5) < 0.6 * seconds
    assert make_plan(width=4).seconds(TFLOPS, 0.5) == pytest.approx(20 * seconds, rel=1e-4)
    assert make_plan(checkpointing=True).seconds(TFLOPS, 0.5) > 1.2 * seconds
