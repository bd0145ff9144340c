"""The models of the benchmarks: the published sizes, and a small one of the same shares of work."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import PROPORTIONS, QWEN2_VL_2B, SMALL, Shape, config_of, stock_model
from benchmarks.samples import Mix, draw
from cocoa_pl.models.published import KNOWN
from cocoa_pl.planning import flops
from cocoa_pl.planning.families import model_shape
from cocoa_pl.planning.tuning import Tuning
from cocoa_pl.planning.work import NOTHING, Work

CPU = torch.device("cpu")


def test_the_large_model_is_the_published_one() -> None:
    published = model_shape(KNOWN["Qwen/Qwen2-VL-2B-Instruct"].config())
    assert model_shape(config_of(QWEN2_VL_2B)) == published


def work_by_part(shape: Shape) -> dict[str, float]:
    """Operations of one image of 16 x 16 visual tokens and 64 text tokens, all of them predicted,
    without attention: its share grows with the length, whatever the widths.
    """
    patches, visual, text = 1024, 256, 64
    work = Work(
        tokens=visual + text,
        samples=1,
        patches=patches,
        visual_tokens=visual,
        text=NOTHING,
        images=NOTHING,
        windows=NOTHING,
        predicted=visual + text,
        rebuilt=0,
    )
    costs = flops.chunk_costs(
        model_shape(config_of(shape)), Tuning(None), work, checkpointing=False, decoder=False
    )
    return {part: cost.forward for part, cost in costs.items()}


def test_shares_of_work_are_those_of_the_large_model() -> None:
    large, small = work_by_part(QWEN2_VL_2B), work_by_part(PROPORTIONS)
    for part in (flops.VISION, flops.HEAD):
        expected = large[part] / large[flops.TEXT]
        assert small[part] / small[flops.TEXT] == pytest.approx(expected, rel=0.1), part
    assert small[flops.HEAD] / small[flops.TEXT] == pytest.approx(0.178, abs=0.001)
    assert sum(large.values()) > 200 * sum(small.values())


def test_weights_depend_on_nothing_but_the_shape() -> None:
    first = stock_model(SMALL, attention="sdpa", device=CPU, dtype=torch.float32).state_dict()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    second = stock_model(SMALL, attention="sdpa", device=CPU, dtype=torch.float32).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_samples_follow_from_the_seed_and_have_skewed_lengths() -> None:
    mix = Mix(text=40, target=10, spread=0.6, sides=(56, 84), max_pixels=28**2 * 9)
    first, again = (draw(mix, 200, shape=SMALL, seed=3) for _ in range(2))
    assert [s.text for s in first] == [s.text for s in again]
    lengths = torch.tensor([float(len(sample.text)) for sample in first])
    assert lengths.median() == pytest.approx(40, rel=0.25)
    assert lengths.max() > 2.5 * lengths.median()
