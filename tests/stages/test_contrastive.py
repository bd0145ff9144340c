"""What saves memory or time in a contrastive step changes no value of it."""

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
from cocoa_pl.errors import UserError
from cocoa_pl.live_bytes import LiveBytes
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.dora import LeanDora
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages.base import Optimization
from cocoa_pl.stages.contrastive import MAX_SCALE, ContrastiveModule, Temperature

ALL = ("context", "eos", "target")
CHUNKS = 5  # of the rows below

Make = Callable[..., ContrastiveModule]


@pytest.fixture(scope="module")
def rows(processor: Processor, make_item: Callable[..., Item]) -> Rows:
    """Six pairs; two share their query, so that something is masked."""

    def encode(seed: int, images: int) -> Encoded:
        item = make_item(seed, images=images)
        return processor.encode(item, None, key=item.key, seed=seed, row_id=f"row {seed}")

    return collate([[encode(max(n, 1), 1), encode(20 + n, 0)] for n in range(6)])


@pytest.fixture
def make(load_tiny: Callable[..., Loaded], processor: Processor) -> Make:
    """A stage with everything on: dropout, masks, both directions, widths, a learnt temperature."""

    def module(*, lean: bool = False, **choices: Any) -> ContrastiveModule:
        torch.manual_seed(0)
        adapter = LowRank(
            rank=4,
            alpha=8,
            dropout=0.3,
            init="gaussian",
            use_dora=True,
            target_modules=[r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"],
            lean_dora=lean,
            dropout_on_base=True,
        )
        made = ContrastiveModule(
            adapter(load_tiny().backbone),
            processor=processor,
            policy=Policy("bidirectional", ALL, ALL, ALL, causal=False),
            optimization=Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
            steps=1,
            seed=0,
            token_budget=32,
            temperature=0.1,
            learn_temperature=True,
            symmetric=True,
            mask_false_negatives=True,
            **({"matryoshka_dims": (8, 16), "similarity_block": 1024, "keep_gib": 0.0} | choices),
        )
        made.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
        return made

    return module


def step(module: ContrastiveModule, rows: Rows) -> tuple[dict[str, Tensor], int]:
    """Metrics and gradients by name, and how often the model was called."""
    calls: list[int] = []
    handle = module.backbone.register_forward_hook(lambda *_: calls.append(1))
    module.train()
    torch.manual_seed(5)
    metrics = module.accumulate(module.preparation(validating=False)(rows))
    handle.remove()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return metrics | gradients, len(calls)


@pytest.fixture
def plain(make: Make, rows: Rows) -> dict[str, Tensor]:
    """The slow twin: one table of similarities, every chunk twice, peft's own layers."""
    module = make(similarity_block=1000)
    assert len(module.preparation(validating=False)(rows).chunks) == CHUNKS
    found, calls = step(module, rows)
    assert calls == 2 * CHUNKS - 1
    return found


@pytest.mark.parametrize("block", [1, 4, 6])
@pytest.mark.parametrize("kept", [1, 3, CHUNKS])
def test_blocks_and_kept_chunks_change_no_value(
    block: int, kept: int, make: Make, rows: Rows, plain: dict[str, Tensor]
) -> None:
    module = make(similarity_block=block)
    first = module.preparation(validating=False)(rows).chunks[0]
    with LiveBytes() as live:
        embeddings = module.train().backbone.embed(first.batch, first.layout)
        assert embeddings.requires_grad
        size = live.now
    # The second chunk is as dear as the first, and the third nearly.
    module.keep_bytes = {1: 0, 3: int(3.1 * size), CHUNKS: 100 * size}[kept]
    found, calls = step(module, rows)
    assert calls == 2 * CHUNKS - kept
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_norms_are_taken_once_in_a_step_and_forgotten_after_it(
    make: Make, rows: Rows, plain: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cocoa_pl.models import dora

    taken: list[int] = []
    original = dora.row_norms

    def counted(*given: Any) -> Tensor:
        taken.append(1)
        return original(*given)

    monkeypatch.setattr(dora, "row_norms", counted)
    module = make(lean=True)
    layers = sum(isinstance(part, LeanDora) for part in module.modules())
    found, _ = step(module, rows)
    assert len(taken) == layers == 14
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    step(module, rows)
    assert len(taken) == 2 * layers


def test_validation_counts_hits_and_losses_by_blocks(make: Make, rows: Rows) -> None:
    with torch.no_grad():
        modules = [make(similarity_block=block).eval() for block in (1000, 4)]
        whole, blocks = (m.measure(m.preparation(validating=True)(rows)) for m in modules)
    assert torch.equal(whole["hits"], blocks["hits"])
    torch.testing.assert_close(whole["loss"], blocks["loss"])


def test_a_fixed_temperature_is_what_the_user_says() -> None:
    for value in (0.005, 0.07, 3.0):
        assert 1 / Temperature(value, learn=False)().item() == pytest.approx(value)


def test_a_learnt_temperature_starts_within_its_bound_and_comes_back_from_it() -> None:
    with pytest.raises(UserError, match=r"temperature=0\.005 is below 0\.01, the bound of"):
        Temperature(0.005, learn=True)
    learnt = Temperature(0.01, learn=True)
    learnt.log_scale.data += 1  # a step too far
    assert learnt().item() == pytest.approx(MAX_SCALE)
    learnt().backward()
    assert learnt.log_scale.grad is not None
    assert learnt.log_scale.grad.item() == pytest.approx(MAX_SCALE)


def test_matryoshka_dims_of_a_narrower_model_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"matryoshka_dims=\[33\] exceed the embedding's 32 dim"):
        make(matryoshka_dims=[33])
