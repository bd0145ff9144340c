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
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.items import Item
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.dora import LeanDora
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages.base import Optimization
from cocoa_pl.stages.contrastive import ContrastiveModule

ALL = ("context", "eos", "target")
CHUNKS = 4  # of the rows below

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
            matryoshka_dims=(8, 16),
            **({"similarity_block": 1024, "keep_chunks": 0} | choices),
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
    metrics = module.accumulate(rows)
    handle.remove()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return metrics | gradients, len(calls)


@pytest.fixture
def plain(make: Make, rows: Rows) -> dict[str, Tensor]:
    """The slow twin: one table of similarities, every chunk twice, peft's own layers."""
    module = make(similarity_block=1000, keep_chunks=0)
    assert len(module.chunks(rows.batch)) == CHUNKS
    found, calls = step(module, rows)
    assert calls == 2 * CHUNKS
    return found


@pytest.mark.parametrize("block", [1, 4, 6])
@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_blocks_and_kept_chunks_change_no_value(
    block: int, keep: int, make: Make, rows: Rows, plain: dict[str, Tensor]
) -> None:
    found, calls = step(make(similarity_block=block, keep_chunks=keep), rows)
    assert calls == 2 * CHUNKS - min(keep, CHUNKS)
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
    module = make(lean=True, keep_chunks=1)
    layers = sum(isinstance(part, LeanDora) for part in module.modules())
    found, _ = step(module, rows)
    assert len(taken) == layers == 14
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    step(module, rows)
    assert len(taken) == 2 * layers


def test_validation_counts_hits_and_losses_by_blocks(make: Make, rows: Rows) -> None:
    with torch.no_grad():
        whole, blocks = (make(similarity_block=block).eval().measure(rows) for block in (1000, 4))
    assert torch.equal(whole["hits"], blocks["hits"])
    torch.testing.assert_close(whole["loss"], blocks["loss"])


@pytest.mark.parametrize("choice", [{"similarity_block": 0}, {"keep_chunks": -1}])
def test_numbers_that_make_no_sense_are_refused(choice: dict[str, int], make: Make) -> None:
    with pytest.raises(UserError, match=r"similarity_block .* must be at least 1"):
        make(**choice)
