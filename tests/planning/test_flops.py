"""Operations are those that torch counts in a real step, and those of the published tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from cocoa_pl.models.published import KNOWN
from cocoa_pl.planning import flops
from cocoa_pl.planning.families import model_shape
from cocoa_pl.planning.tuning import Tuning
from cocoa_pl.planning.work import NOTHING, Attention, Work

MakeSmall = Callable[..., Any]
aten: Any = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    found: int = sdpa_flop_count(q, k, v)
    return found


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> int:
    found: int = sdpa_backward_flop_count(grad, q, k, v)
    return found


# torch counts flash attention on CUDA and leaves out the same function on the CPU.
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(small: Any) -> float:
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        small.step()
    return counter.get_total_flops()


def planned(small: Any, *, cached: bool = False) -> float:
    found = [
        flops.chunk_costs(
            small.shape,
            small.tuning,
            work,
            checkpointing=small.checkpointing,
            decoder=small.decoder,
        )
        for work in small.works
    ]
    if cached:
        found += [flops.without_graph(costs) for costs in found[1:]]
    found.append(flops.norm_costs(small.shape, small.tuning))
    if small.contrasts:
        sizes = {"queries": small.queries, "candidates": small.candidates}
        found.append(flops.similarity_costs(small.shape.text.width, **sizes))
    return sum(cost.total for cost in flops.total(found).values())


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["kept", "recomputed"]
)
@pytest.mark.parametrize(
    "adapter",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dora")), "lora", "leaner"],
)
@pytest.mark.parametrize(
    "stage",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pretrain", "reconstruct")),
        *("warmup", "contrast"),
    ],
)
def test_a_step_costs_what_torch_counts(
    stage: str, adapter: str, checkpointing: bool, make_small: MakeSmall
) -> None:
    small = make_small(stage, adapter=adapter, checkpointing=checkpointing)
    assert planned(small) == counted(small)


@pytest.mark.parametrize(
    "adapter",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dora")), "lora", "lean"],
)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_so_do_the_other_families(family: str, adapter: str, make_small: MakeSmall) -> None:
    small = make_small("warmup", family=family, adapter=adapter, checkpointing=True)
    assert planned(small) == counted(small)


@pytest.mark.parametrize("policy", ["bidirectional", "causal", "eos_bridge", "eos_bridge_strict"])
def test_so_does_every_policy(policy: str, make_small: MakeSmall) -> None:
    small = make_small("reconstruct", policy=policy, adapter="lora")
    assert planned(small) == counted(small)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_gradient_cache_adds_a_forward_pass(adapter: str, make_small: MakeSmall) -> None:
    small = make_small("contrast", adapter=adapter, rows=3, token_budget=60)
    assert len(small.works) > 3
    assert planned(small, cached=True) == counted(small)
    assert planned(small) < counted(small)


def test_rows_without_images_cost_no_vision_and_no_gradient_of_inputs(
    make_small: MakeSmall, lengths: Any
) -> None:
    texts = replace(lengths, images_per_query=0)
    for adapter in ("none", "lora"):
        small = make_small("contrast", adapter=adapter, lengths=texts)
        assert planned(small) == counted(small)


def test_half_precision_costs_the_same_operations(make_small: MakeSmall) -> None:
    small = make_small("warmup", adapter="dora", checkpointing=True, dtype=torch.bfloat16)
    assert planned(small) == counted(small)


@pytest.mark.parametrize(
    ("name", "text", "visual", "head"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", 2.62, 8.46, 0.467),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 5.55, 10.9, 0.622),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 13.05, 18.4, 1.09),
    ],
)
def test_a_forward_pass_costs_what_was_worked_out_by_hand(
    name: str, text: float, visual: float, head: float
) -> None:
    """GFLOP of a text token, of a visual token of a 448 x 448 image, and of a predicted position,
    from twice the parameters plus the scores of the vision tower.
    """
    config: Any = KNOWN[name].config()
    shape = model_shape(config)
    nothing = Work(1000, 1, 0, 0, NOTHING, NOTHING, NOTHING, predicted=1000, rebuilt=0)
    found = forward(shape, nothing)
    assert found[flops.TEXT] / 1000 == pytest.approx(text * 1e9, rel=3e-3)
    assert found[flops.HEAD] / 1000 == pytest.approx(head * 1e9, rel=3e-3)

    patches = 1024
    whole = Attention(patches**2, patches, patches)
    windows = Attention(64 * patches, patches, patches) if shape.vision.window else NOTHING
    image = Work(256, 1, patches, 256, NOTHING, whole, windows, predicted=0, rebuilt=0)
    found = forward(shape, image)
    everything = found[flops.VISION] + found[flops.TEXT] + found[flops.SCORES]
    assert everything / 256 == pytest.approx(visual * 1e9, rel=1e-2)


def forward(shape: Any, work: Work) -> dict[str, float]:
    costs = flops.chunk_costs(shape, Tuning(None), work, checkpointing=False, decoder=False)
    return {part: cost.forward for part, cost in costs.items()}
