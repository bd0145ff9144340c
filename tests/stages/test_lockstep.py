"""Fillers even out what ranks call, and change no loss and no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Batch, Encoded, Rows, join, pack
from cocoa_pl.data.datamodule import collate
from cocoa_pl.data.items import Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages import lockstep
from cocoa_pl.stages.base import Optimization, StageModule
from cocoa_pl.stages.chunks import Chunk, ToEmbed
from cocoa_pl.stages.contrastive import ContrastiveModule
from cocoa_pl.stages.lockstep import Fillers, in_lockstep, make_fillers
from cocoa_pl.stages.reconstruction import ReconstructionModule

EVERYTHING = ("context", "eos", "target")
FULL = Policy("bidirectional", EVERYTHING, EVERYTHING, EVERYTHING, causal=False)
BRIDGE = Policy("eos_bridge", ("context", "eos"), EVERYTHING, ("eos", "target"), causal=False)
MakeSamples = Callable[..., list[Encoded]]


@pytest.fixture(scope="module")
def fillers(processor: Processor) -> Fillers:
    return make_fillers(processor)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Another rank has so many chunks, and these of them with images."""

    def pretend(chunks: int, images: list[bool]) -> None:
        answers: Iterator[Any] = iter([torch.tensor(chunks), torch.tensor(images).int()])

        def global_max(mine: Tensor) -> Tensor:
            theirs = next(answers)
            if mine.ndim:
                theirs = torch.cat([theirs, theirs.new_zeros(len(mine) - len(theirs))])
            return torch.maximum(mine, theirs)

        monkeypatch.setattr(lockstep, "global_max", global_max)

    return pretend


def test_fillers_are_one_sample_with_and_without_an_image(fillers: Fillers) -> None:
    assert (fillers.text.num_samples, len(fillers.text.grids)) == (1, 0)
    assert (fillers.image.num_samples, len(fillers.image.grids)) == (1, 1)
    assert fillers.image.image_mask.sum() == 1
    assert fillers.text.num_real_tokens == fillers.image.num_real_tokens == 0


@pytest.fixture(scope="module")
def preparation(loaded: Loaded) -> ToEmbed:
    return ToEmbed(loaded.backbone.layouts(FULL), token_budget=30)


@pytest.fixture(scope="module")
def evened_out(fillers: Fillers, preparation: ToEmbed) -> Callable[[list[Chunk]], list[Chunk]]:
    return lambda chunks: in_lockstep(chunks, fillers, preparation, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def chunk_of(preparation: ToEmbed, make_samples: MakeSamples) -> Callable[..., Chunk]:
    """A chunk of samples with so many images each."""

    def make(*images: int) -> Chunk:
        batch = pack(make_samples(images))
        return preparation.chunks(batch, [torch.arange(len(images))])[0]

    return make


def test_alone_nothing_is_added(evened_out: Any, chunk_of: Callable[..., Chunk]) -> None:
    chunks = [chunk_of(0, 0), chunk_of(1)]
    assert [id(chunk) for chunk in evened_out(chunks)] == [id(chunk) for chunk in chunks]


def test_a_rank_follows_the_others(
    evened_out: Any, chunk_of: Callable[..., Chunk], others: Callable[..., None]
) -> None:
    chunks = [chunk_of(0, 0), chunk_of(1), chunk_of(0)]
    others(5, [True, False, False, True, False])
    got = evened_out(chunks)
    batches: list[Batch] = [chunk.batch for chunk in got]
    assert [batch.num_fillers for batch in batches] == [1, 0, 0, 1, 1]
    assert [len(batch.grids) for batch in batches] == [1, 1, 0, 1, 0]
    own = [chunk.batch.num_tokens for chunk in chunks]
    assert [batch.num_real_tokens for batch in batches] == [*own, 0, 0]
    assert [len(chunk.layout.eos_rows) for chunk in got] == [2, 1, 1, 0, 0]
    assert got[1] is chunks[1]
    assert torch.equal(batches[0].input_ids[: own[0]], chunks[0].batch.input_ids)


def test_a_longer_list_stays_as_it_is(
    evened_out: Any, chunk_of: Callable[..., Chunk], others: Callable[..., None]
) -> None:
    chunks = [chunk_of(1), chunk_of(0)]
    others(1, [False])
    assert [id(chunk) for chunk in evened_out(chunks)] == [id(chunk) for chunk in chunks]


def test_joined_batches_are_as_packed_at_once(make_samples: MakeSamples) -> None:
    samples = make_samples((2, 0, 1, 0), targets=True)
    joined, whole = join([pack(samples[:1]), pack(samples[1:])]), pack(samples)
    for name in ("input_ids", "position_ids", "patches", "segment_lengths", "grids", "keys"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert joined.row_ids == whole.row_ids


CASES: dict[str, tuple[type[StageModule[Any]], Policy, dict[str, Any]]] = {
    "warmup": (
        ReconstructionModule,
        FULL,
        {"text_ratio": 0.2, "text_segment": "context", "patch_ratio": 0.5, "patch_weight": 0.5},
    ),
    "captioning": (
        ReconstructionModule,
        FULL,
        {"text_ratio": None, "text_segment": "context", "patch_ratio": 0.0, "patch_weight": 0.0},
    ),
    "reconstruct": (
        ReconstructionModule,
        BRIDGE,
        {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0, "patch_weight": 0.0},
    ),
    "contrast": (
        ContrastiveModule,
        FULL,
        {
            "temperature": 0.1,
            "learn_temperature": True,
            "symmetric": True,
            "mask_false_negatives": True,
            "matryoshka_dims": (8,),
            "similarity_block": 2,
            "keep_gib": 0,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fillers_are_in_no_loss_gradient_or_measure(
    name: str,
    load_tiny: Callable[..., Loaded],
    processor: Processor,
    make_item: Callable[..., Item],
    fillers: Fillers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, policy, values = CASES[name]

    def encode(seed: int, images: int, target: str | None) -> Encoded:
        item = make_item(seed, images=images)
        return processor.encode(item, target, key=item.key, seed=seed, row_id=f"row {seed}")

    rows: Rows = (
        collate([[encode(n, n % 2, None), encode(9 + n, 0, None)] for n in range(4)])
        if name == "contrast"
        else collate([[encode(n, n % 2, make_item(20 + n).text)] for n in range(4)])
    )

    def found(*, filled: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = kind(
            load_tiny().backbone.requires_grad_(True),
            processor=processor,
            policy=policy,
            optimization=Optimization(1e-3, 0.0, (0.9, 0.98), "linear", 0, 1.0),
            token_budget=30,
            steps=1,
            seed=0,
            **values,
        )
        prepare = module.preparation(validating=False)
        if filled:  # as if another rank had images everywhere and two chunks more
            monkeypatch.setattr(
                module,
                "in_step",
                lambda chunks: [
                    *(prepare.filled(chunk, fillers.image) for chunk in chunks),
                    *map(prepare.filler, [fillers.image, fillers.text] if chunks else []),
                ],
            )
        monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
        metrics = module.accumulate(prepare(rows))
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        with torch.no_grad():
            measured = module.measure(module.preparation(validating=True)(rows))
        return {**{f"train {n}": v for n, v in metrics.items()}, **gradients, **measured}

    plain, filled = found(filled=False), found(filled=True)
    assert plain.keys() == filled.keys()
    assert plain["train loss"] > 0
    for key, value in plain.items():
        torch.testing.assert_close(filled[key], value, rtol=1e-4, atol=1e-5, msg=key)
