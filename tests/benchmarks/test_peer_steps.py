"""The re-created training steps of peers compute what this project computes, from the same weights:
losses and gradients, at dropout 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.attention_bridge import policy
from benchmarks.models import MERGE, PATCH, SMALL, image_processor, special_ids, stock_model
from benchmarks.ours import adapters_of, packed, with_dora, wrapped
from benchmarks.peers.attention import additive_mask
from benchmarks.peers.dora import adapt
from benchmarks.peers.grad_cache import cached_step
from benchmarks.peers.inputs import Row
from benchmarks.peers.model import DENSE_VISION, VISION_BY_IMAGE, PeerModel, PixelDecoder
from benchmarks.peers.steps import CHUNK, collator, contrast_step, reconstruct_step, warmup_step
from benchmarks.samples import Mix, Sample, corrupted_rows, draw, rows_of
from cocoa_pl.attention import Policy
from cocoa_pl.batch import Batch
from cocoa_pl.corruption import Corrupted, Corruption, noise_of, with_noise
from cocoa_pl.grad_cache import cached_backward
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.heads import ImageDecoder, token_pixels
from cocoa_pl.objectives import info_nce, masked_next_token, rebuilt_patches

CPU = torch.device("cpu")
MAX_PIXELS = 24 * 28**2
PICTURES = Mix(text=6, target=9, spread=0.5, sides=(40, 90, 130), max_pixels=MAX_PIXELS)
TEXTS = Mix(text=8, target=0, spread=0.5, sides=(), max_pixels=MAX_PIXELS)
REBUILD = Corruption(
    text_ratio=0.7,
    text_segment="target",
    patch_ratio=0.0,
    mask_token_id=SMALL.vocabulary - 1,
    merge_size=MERGE,
)
WARMUP = replace(REBUILD, text_ratio=0.2, text_segment="context", patch_ratio=0.3)


@pytest.fixture
def processor() -> Any:
    return image_processor(MAX_PIXELS)


@pytest.fixture
def ours(processor: Any) -> Backbone:
    return wrapped(SMALL, image_processor=processor, kernel="sdpa", device=CPU, dtype=torch.float32)


def peer(*, attention: Policy, vision: str = DENSE_VISION) -> PeerModel:
    stock = stock_model(SMALL, attention="sdpa", device=CPU, dtype=torch.float32)
    return PeerModel(stock, table=attention.table, vision=vision)


def collate(processor: Any) -> Any:
    ids = special_ids(SMALL)
    return collator(image_processor=processor, pad_id=ids["bos_token_id"], device=CPU)


def batch_of(samples: Sequence[Sample], processor: Any) -> Batch:
    return packed(samples, shape=SMALL, max_pixels=MAX_PIXELS, resample=processor.resample)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    assert ours
    assert ours.keys() == peer.keys()
    for name, expected in peer.items():
        error = (ours[name] - expected).norm()
        assert error <= 2e-4 * expected.norm() + 1e-7, name


def without(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items()}


def token_losses(ours: Backbone, corrupted: Corrupted, attention: Policy) -> Tensor:
    """Of every hidden token."""
    hidden = corrupted.token_mask.nonzero()[:, 0]
    layout = ours.layouts(attention)(corrupted.batch)
    states = ours(corrupted.batch, layout, reads=hidden - 1)
    return masked_next_token(ours.vocabulary(states), corrupted.labels[hidden])[0]


# --- Generative stages -------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [DENSE_VISION, VISION_BY_IMAGE])
def test_reconstruct_has_the_same_loss_and_gradients(
    vision: str, ours: Backbone, processor: Any
) -> None:
    samples = draw(PICTURES, 4, shape=SMALL, seed=0)
    bridge, batch = policy("eos_bridge"), batch_of(samples, processor)
    corrupted = REBUILD(batch)
    losses = token_losses(ours, corrupted, bridge)
    losses.mean().backward()

    model = peer(attention=bridge, vision=vision)
    rows = corrupted_rows(samples, corrupted, ours.pixels(batch))
    loss = reconstruct_step(model, rows, collate=collate(processor))
    torch.testing.assert_close(loss, losses.mean().detach(), rtol=1e-5, atol=0)
    assert_same_gradients(without("model.", gradients(ours)), without("stock.", gradients(model)))


def test_the_bridge_is_seen_by_the_loss(ours: Backbone, processor: Any) -> None:
    """The comparison above would not tell two attention policies apart else."""
    samples = draw(PICTURES, 2, shape=SMALL, seed=0)
    corrupted = REBUILD(batch_of(samples, processor))
    first, second = (
        token_losses(ours, corrupted, policy(name)).mean()
        for name in ("eos_bridge", "bidirectional")
    )
    assert (first - second).abs() > 1e-3


def test_warmup_has_the_same_loss_and_gradients(ours: Backbone, processor: Any) -> None:
    samples = [
        *draw(PICTURES, 3, shape=SMALL, seed=1),
        *draw(TEXTS, 1, shape=SMALL, seed=2),  # a row without a picture
    ]
    full, batch = policy("bidirectional"), batch_of(samples, processor)
    corrupted = WARMUP(batch)
    seen, clean = corrupted.batch, ours.pixels(batch)
    noisy = with_noise(clean, noise_of(batch, corrupted.patch_mask, merge_size=MERGE))
    decoder = ImageDecoder(ours, patch_values=3 * PATCH**2)

    layout = ours.layouts(full)(seen)
    hidden = ours(seen, layout, noisy)
    places = corrupted.token_mask.nonzero()[:, 0]
    losses, _ = masked_next_token(ours.vocabulary(hidden[places - 1]), corrupted.labels[places])
    visual = corrupted.patch_mask[seen.image_mask].nonzero()[:, 0]
    targets = token_pixels(clean, visual, merge_size=MERGE)
    predicted = decoder(ours, hidden, seen, layout, corrupted.patch_mask.nonzero()[:, 0])
    expected = losses.mean() + 0.5 * rebuilt_patches(predicted, targets).mean()
    expected.backward()

    model = peer(attention=full)
    text = model.stock.model.language_model
    theirs = PixelDecoder(
        type(text.layers[0])(text.config, layer_idx=0),
        nn.Linear(*reversed(decoder.projection.weight.shape)),
    )
    theirs.load_state_dict(decoder.state_dict())
    loss = warmup_step(
        model,
        corrupted_rows(samples, corrupted, noisy),
        collate=collate(processor),
        decoder=theirs,
        weight=0.5,
        clean=[targets],
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(decoder), gradients(theirs))
    assert_same_gradients(without("model.", gradients(ours)), without("stock.", gradients(model)))


# --- Contrast, with adapters -------------------------------------------------------------------


def renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of our adapters by the peer's names."""
    names = {
        ".lora_A.default.weight": ".a",
        ".lora_B.default.weight": ".b",
        ".lora_magnitude_vector.default.weight": ".magnitude",
    }
    changed = {}
    for name, value in found.items():
        ending = next(ending for ending in names if name.endswith(ending))
        stem = name.removeprefix("model.base_model.model.").removesuffix(ending)
        changed[stem + names[ending]] = value
    return changed


@pytest.mark.parametrize("pad_whole_batch", [False, True], ids=["by chunk", "whole batch"])
def test_contrast_has_the_same_loss_and_gradients(
    pad_whole_batch: bool, ours: Backbone, processor: Any
) -> None:
    full, count = policy("bidirectional"), CHUNK + 3
    queries = draw(
        Mix(text=5, target=0, spread=0.5, sides=(40, 90), max_pixels=MAX_PIXELS),
        count,
        shape=SMALL,
        seed=3,
    )
    positives = draw(TEXTS, count, shape=SMALL, seed=4)
    backbone = with_dora(ours, rank=2, alpha=8, dropout=0.0, dropout_on_base=False)
    halves = [batch_of(half, processor) for half in (queries, positives)]

    def loss(embeddings: Tensor) -> Tensor:
        losses, _ = info_nce(
            embeddings[:count],
            embeddings[count:],
            torch.arange(count),
            torch.tensor(1 / 0.02),
            false_negatives=None,
        )
        return losses.mean()

    layouts = backbone.layouts(full)
    expected = cached_backward(
        lambda chunk: backbone.embed(chunk, layouts(chunk)),
        [half.select(n, n + 1) for half in halves for n in range(count)],
        loss,
        keep_bytes=0,
        agreed=bool,
        backward=lambda value: value.backward(),
        device=CPU,
    )

    model = peer(attention=full, vision=VISION_BY_IMAGE)
    adapt(model.stock, adapters_of(backbone), scaling=4.0, dropout=0.0)
    found = contrast_step(
        model,
        *(rows_of(side, half) for side, half in zip((queries, positives), halves, strict=True)),
        collate=collate(processor),
        temperature=0.02,
        pad_whole_batch=pad_whole_batch,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same_gradients(renamed(gradients(backbone)), without("stock.", gradients(model)))


# --- Their batches -----------------------------------------------------------------------------


def test_peers_pad_to_the_longest_and_run_the_image_processor_once_a_sample(processor: Any) -> None:
    samples = draw(PICTURES, 5, shape=SMALL, seed=5)
    batch = batch_of(samples, processor)
    calls: list[int] = []

    class Counting:
        def __call__(self, images: Sequence[Any], **keywords: Any) -> Any:
            calls.append(len(images))
            return processor(images, **keywords)

    rows: list[Row] = rows_of(samples, batch)
    inputs = collate(Counting())(rows)
    longest = int(batch.lengths.max())
    assert inputs.slots == len(samples) * longest
    assert inputs.attention_mask.sum() == batch.num_tokens
    assert calls == [1] * len(samples)
    assert [one.slots for one in inputs.split(2)] == [2 * longest, 2 * longest, longest]


def test_nobody_sees_padding_which_sees_something() -> None:
    lengths = torch.tensor([[2, 1, 1], [1, 1, 0]])
    mask = additive_mask(
        policy("eos_bridge").table, lengths, slots=5, device=CPU, dtype=torch.bfloat16
    )
    seen = mask[:, 0] == 0
    for sample, length in zip(seen, lengths.sum(1).tolist(), strict=True):
        assert not sample[:length, length:].any()
        assert sample.any(1).all()


def test_positions_of_padded_rows_are_those_of_the_packed_batch(processor: Any) -> None:
    samples = draw(PICTURES, 3, shape=SMALL, seed=6)
    batch = batch_of(samples, processor)
    model = peer(attention=policy("bidirectional"))
    inputs = collate(processor)(rows_of(samples, batch))
    positions = model(inputs).positions
    real = inputs.attention_mask.bool()
    assert torch.equal(positions[:, real], batch.position_ids)


def test_the_peers_gradient_cache_draws_dropout_again() -> None:
    weight = torch.ones(6, requires_grad=True)
    seen: list[Tensor] = []

    def embed(chunk: Tensor) -> Tensor:
        rows = nn.functional.dropout(chunk * weight, 0.5)
        seen.append(rows.detach().clone())
        return rows

    torch.manual_seed(0)
    queries, positives = (list(torch.rand(4, 6).split(2)) for _ in range(2))
    cached_step(embed, queries, positives, temperature=1.0)
    first, second = seen[:4], seen[4:]
    assert all(torch.equal(one, again) for one, again in zip(first, second, strict=True))
    assert not torch.equal(first[0].bool(), first[1].bool())
    assert weight.grad is not None
    assert weight.grad.any()
