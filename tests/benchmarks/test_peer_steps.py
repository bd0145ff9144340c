"""The re-created training steps of peers compute what this project computes, from the same weights:
losses and gradients, at dropout 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.attention_bridge import policy
from benchmarks.models import MERGE, SMALL, special_ids, stock_model
from benchmarks.ours import adapters_of, with_dora, wrapped
from benchmarks.peers.attention import additive_mask
from benchmarks.peers.dora import adapt
from benchmarks.peers.grad_cache import cached_step
from benchmarks.peers.model import DENSE_VISION, VISION_BY_IMAGE, PeerModel, PixelDecoder
from benchmarks.peers.steps import CHUNK, collator, contrast_step, reconstruct_step, warmup_step
from benchmarks.samples import Drawn, Mix, draw, make_processor, process, row_of
from cocoa_pl.attention import Policy
from cocoa_pl.data.batch import Sample, pack
from cocoa_pl.data.masking import Masking, with_noise
from cocoa_pl.data.processor import Processor
from cocoa_pl.grad_cache import GradientCache
from cocoa_pl.losses import info_nce, masked_next_token, rebuilt_patches
from cocoa_pl.models.backbone import Backbone, ImageDecoder

CPU = torch.device("cpu")
MAX_PIXELS = 24 * 28**2
PICTURES = Mix(text=6, target=9, spread=0.5, sides=(40, 90, 130), max_pixels=MAX_PIXELS)
TEXTS = Mix(text=8, target=0, spread=0.5, sides=(), max_pixels=MAX_PIXELS)
REBUILD = Masking(
    text_ratio=0.7, text_segment="target", patch_ratio=0.0, mask_token_id=SMALL.vocabulary - 1
)
WARMUP = replace(REBUILD, text_ratio=0.2, text_segment="context", patch_ratio=0.3)


@pytest.fixture
def processor() -> Processor:
    return make_processor(SMALL, MAX_PIXELS)


@pytest.fixture
def ours(processor: Processor) -> Backbone:
    images = processor.image_processor
    return wrapped(SMALL, image_processor=images, kernel="sdpa", device=CPU, dtype=torch.float32)


def peer(*, attention: Policy, vision: str = DENSE_VISION) -> PeerModel:
    stock = stock_model(SMALL, attention="sdpa", device=CPU, dtype=torch.float32)
    return PeerModel(stock, table=attention.table, vision=vision)


def collate(image_processor: Any) -> Any:
    ids = special_ids(SMALL)
    return collator(image_processor=image_processor, pad_id=ids["bos_token_id"], device=CPU)


def processed(
    drawn: Sequence[Drawn], processor: Processor, masking: Masking | None = None
) -> list[Sample]:
    samples = [process(one, processor, n) for n, one in enumerate(drawn)]
    if masking is None:
        return samples
    return [masking(sample, np.random.default_rng(sample.key)) for sample in samples]


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


def token_losses(ours: Backbone, samples: Sequence[Sample], attention: Policy) -> Tensor:
    """Of every hidden token."""
    batch = pack(samples, ours.planner(attention))
    return masked_next_token(ours.vocabulary(ours(batch)[batch.token_rows]), batch.targets)[0]


# --- Generative stages -------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [DENSE_VISION, VISION_BY_IMAGE])
def test_reconstruct_has_the_same_loss_and_gradients(
    vision: str, ours: Backbone, processor: Processor
) -> None:
    drawn = draw(PICTURES, 4, shape=SMALL, seed=0)
    bridge, samples = policy("eos_bridge"), processed(drawn, processor, REBUILD)
    losses = token_losses(ours, samples, bridge)
    losses.mean().backward()

    model = peer(attention=bridge, vision=vision)
    rows = list(map(row_of, drawn, samples))
    loss = reconstruct_step(model, rows, collate=collate(processor.image_processor))
    torch.testing.assert_close(loss, losses.mean().detach(), rtol=1e-5, atol=0)
    assert_same_gradients(without("model.", gradients(ours)), without("stock.", gradients(model)))


def test_the_bridge_is_seen_by_the_loss(ours: Backbone, processor: Processor) -> None:
    """The comparison above would not tell two attention policies apart else."""
    samples = processed(draw(PICTURES, 2, shape=SMALL, seed=0), processor, REBUILD)
    first, second = (
        token_losses(ours, samples, policy(name)) for name in ("eos_bridge", "bidirectional")
    )
    assert (first - second).abs().max() > 1e-2


def test_warmup_has_the_same_loss_and_gradients(ours: Backbone, processor: Processor) -> None:
    drawn = [
        *draw(PICTURES, 3, shape=SMALL, seed=1),
        *draw(TEXTS, 1, shape=SMALL, seed=2),  # a row without a picture
    ]
    full, samples = policy("bidirectional"), processed(drawn, processor, WARMUP)
    batch = pack(samples, ours.planner(full))
    clean = ours.pixels(batch)
    noisy = with_noise(clean, batch, merge_size=MERGE)
    decoder = ImageDecoder(ours, patch_values=processor.patch_values)

    hidden = ours(batch, noisy)
    losses, _ = masked_next_token(ours.vocabulary(hidden[batch.token_rows]), batch.targets)
    targets = clean.view(len(batch.visual_rows), -1)[batch.patch_places]
    predicted = decoder(ours, hidden, batch)
    expected = losses.mean() + 0.5 * rebuilt_patches(predicted, targets).mean()
    expected.backward()

    model = peer(attention=full)
    text = model.stock.model.language_model
    theirs = PixelDecoder(
        type(text.layers[0])(text.config, layer_idx=0),
        nn.Linear(*reversed(decoder.projection.weight.shape)),
    )
    theirs.load_state_dict(decoder.state_dict())
    pixels = noisy.split([len(sample.patches) for sample in samples])
    loss = warmup_step(
        model,
        list(map(row_of, drawn, samples, pixels)),
        collate=collate(processor.image_processor),
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
    pad_whole_batch: bool, ours: Backbone, processor: Processor
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
    plan, sides = backbone.planner(full), (queries, positives)
    halves = [processed(side, processor) for side in sides]
    samples = [sample for half in halves for sample in half]
    cache = GradientCache(backbone.embed, [pack([sample], plan) for sample in samples])
    losses, *_ = info_nce(
        cache.embeddings[:count],
        cache.embeddings[count:],
        torch.arange(count),
        torch.tensor(1 / 0.02),
        keys=None,
        block=count,
    )
    losses.mean().backward()
    cache.backward(lambda value: value.backward())

    model = peer(attention=full, vision=VISION_BY_IMAGE)
    adapt(model.stock, adapters_of(backbone), scaling=4.0, dropout=0.0)
    found = contrast_step(
        model,
        *(list(map(row_of, side, half)) for side, half in zip(sides, halves, strict=True)),
        collate=collate(processor.image_processor),
        temperature=0.02,
        pad_whole_batch=pad_whole_batch,
    )
    torch.testing.assert_close(found, losses.mean().detach(), rtol=1e-4, atol=0)
    assert_same_gradients(renamed(gradients(backbone)), without("stock.", gradients(model)))


# --- Their batches -----------------------------------------------------------------------------


def test_peers_pad_to_the_longest_and_run_the_image_processor_once_a_sample(
    processor: Processor,
) -> None:
    drawn = draw(PICTURES, 5, shape=SMALL, seed=5)
    samples = processed(drawn, processor)
    calls: list[int] = []

    def counting(images: Sequence[Any], **keywords: Any) -> Any:
        calls.append(len(images))
        return processor.image_processor(images, **keywords)

    inputs = collate(counting)(list(map(row_of, drawn, samples)))
    lengths = [sample.num_tokens for sample in samples]
    longest = max(lengths)
    assert inputs.slots == len(samples) * longest
    assert inputs.attention_mask.sum() == sum(lengths)
    assert calls == [1] * len(samples)
    assert [one.slots for one in inputs.split(2)] == [2 * longest, 2 * longest, longest]


def test_padding_is_hidden_and_has_keys() -> None:
    lengths = torch.tensor([[2, 1, 1], [1, 1, 0]])
    mask = additive_mask(
        policy("eos_bridge").table, lengths, slots=5, device=CPU, dtype=torch.bfloat16
    )
    seen = mask[:, 0] == 0
    for sample, length in zip(seen, lengths.sum(1).tolist(), strict=True):
        assert not sample[:length, length:].any()
        assert sample.any(1).all()


def test_positions_of_padded_rows_are_those_of_samples(processor: Processor) -> None:
    drawn = draw(PICTURES, 3, shape=SMALL, seed=6)
    samples = processed(drawn, processor)
    model = peer(attention=policy("bidirectional"))
    inputs = collate(processor.image_processor)(list(map(row_of, drawn, samples)))
    positions = model(inputs).positions
    real = inputs.attention_mask.bool()
    expected = np.concatenate([sample.position_ids for sample in samples], axis=1)
    assert torch.equal(positions[:, real], torch.from_numpy(expected))


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
