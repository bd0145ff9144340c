"""Every family's wrapped model against the policy table and against itself one by one; parity with
the stock forward is in `test_stock_parity.py`.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy, dense_mask
from cocoa_pl.data.batch import Batch, Sample
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.backbone import Backbone, ImageDecoder
from cocoa_pl.models.loading import FAMILIES, Loaded

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

POLICIES = ("bidirectional", "causal", "eos_bridge", "eos_bridge_strict")
IMAGES = (1, 0, 2, 0, 1, 2, 1)  # images of each sample; every second sample has a TARGET
MakeSamples = Callable[..., list[Sample]]
LoadTiny = Callable[..., Loaded]
Packed = Callable[..., Batch]


@pytest.fixture(scope="module")
def one_layer(make_source: Any, texts: list[str], load_tiny: LoadTiny) -> Backbone:
    """float64 and a single layer: deeper stacks rightly leak through EOS."""
    folder = make_source(num_hidden_layers=1).folder(lambda: texts)
    return load_tiny(folder=folder).backbone.double()


@torch.no_grad()
def run(backbone: Backbone, batch: Batch) -> Tensor:
    hidden: Tensor = backbone(batch)
    return hidden


def assert_close(got: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def dependency(states: Tensor, inputs: Tensor) -> Tensor:
    """(T, rows of the inputs) bool: which rows have a gradient from which state."""
    gradients = [torch.autograd.grad(s.sum(), inputs, retain_graph=True)[0] for s in states]
    return torch.stack(gradients).view(len(states), -1, inputs.shape[-1]).any(2)


# --- Who depends on whom ---------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_gradient_dependency_is_the_policy_table(
    name: str,
    one_layer: Backbone,
    policies: dict[str, Policy],
    make_samples: MakeSamples,
    packed: Packed,
) -> None:
    """Of states on tokens, and of states on pixels: rows that see an image's tokens."""
    batch = packed(make_samples((2, 0, 0, 1), targets=True), name)
    inputs: list[Tensor] = []

    def keep(_: object, __: object, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["inputs_embeds"])

    language_model = one_layer.stock.model.language_model
    handle = language_model.register_forward_pre_hook(keep, with_kwargs=True)
    pixels = one_layer.pixels(batch).double().requires_grad_()
    hidden = one_layer(batch, pixels)
    handle.remove()
    mask = dense_mask(policies[name], batch.segment_lengths)
    assert torch.equal(dependency(hidden, inputs[0]), mask)
    patches = batch.grids.prod(1)
    images = dependency(hidden, pixels).split(patches.tolist(), dim=1)
    columns = batch.visual_rows.split((patches // 4).tolist())
    for image, tokens in zip(images, columns, strict=True):
        assert torch.equal(image.any(1), mask[:, tokens].any(1))


@pytest.mark.parametrize("name", ["eos_bridge", "eos_bridge_strict"])
def test_target_never_sees_context_in_one_layer_but_hears_of_it_through_eos_in_two(
    name: str, one_layer: Backbone, loaded: Loaded, make_samples: MakeSamples, packed: Packed
) -> None:
    (sample,) = make_samples((1,), targets=True)
    ids = sample.input_ids.copy()
    ids[0] += 1
    changed = dataclasses.replace(sample, input_ids=ids)
    first = sample.segment_lengths[0] + 1
    for backbone, hears in ((one_layer, False), (loaded.backbone, True)):
        before, after = (run(backbone, packed([one], name)) for one in (sample, changed))
        assert not torch.equal(before[:first], after[:first])
        assert torch.equal(before[first:], after[first:]) != hears


# --- Packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_packed_equals_one_by_one_in_every_order(
    name: str, loaded: Loaded, make_samples: MakeSamples, packed: Packed
) -> None:
    samples = make_samples(IMAGES, targets=True)
    alone = [run(loaded.backbone, packed([sample], name)) for sample in samples]
    for seed in range(3):
        order = random.Random(seed).sample(range(len(samples)), len(samples))
        together = run(loaded.backbone, packed([samples[i] for i in order], name))
        assert_close(together, torch.cat([alone[i] for i in order]))


def test_embeddings_in_bfloat16_do_not_depend_on_neighbours(
    load_tiny: LoadTiny, make_samples: MakeSamples, packed: Packed
) -> None:
    """It keeps 8 bits, and a padded bucket sums in another order; each layer may round."""
    backbone, samples = load_tiny(dtype="bfloat16").backbone, make_samples(IMAGES)
    with torch.no_grad():
        alone = torch.cat([backbone.embed(packed([sample])) for sample in samples])
        together = backbone.embed(packed(samples[::-1])).flip(0)
    assert alone.dtype == torch.float32
    assert_close(alone.norm(dim=1), torch.ones(7))
    assert (alone @ alone.T - 2 * torch.eye(7)).max() < 0.999, "samples differ"
    assert_close(together, alone, tolerance=2**-6)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", ["eos_bridge", "causal"])
def test_embedding_is_the_normalised_mean_of_the_bottlenecks_states(
    name: str, length: int, loaded: Loaded, make_samples: MakeSamples, packed: Packed
) -> None:
    around = length // 2  # tokens of CONTEXT and of TARGET that count to BOTTLENECK
    samples = [
        dataclasses.replace(s, segment_lengths=(context - around, length, target - around))
        for s in make_samples(IMAGES, targets=True)
        for context, _, target in [s.segment_lengths]
        if target
    ]
    with torch.no_grad():
        embeddings = loaded.backbone.embed(packed(samples, name))
    for sample, embedding in zip(samples, embeddings, strict=True):
        start = sample.segment_lengths[0]
        state = run(loaded.backbone, packed([sample], name))[start : start + length].mean(0)
        assert_close(embedding, state / state.norm())


# --- Wiring ----------------------------------------------------------------------------------


def test_model_without_a_plan_fails_instead_of_running_causally(
    loaded: Loaded, processor: Processor, make_samples: MakeSamples, packed: Packed
) -> None:
    model = loaded.backbone.stock
    frames = torch.zeros(4, 2 * processor.patch_values)
    with pytest.raises(TypeError, match="plan"):
        model(input_ids=packed(make_samples((0,))).input_ids[None])
    with pytest.raises((TypeError, KeyError), match="plan"):
        model.model.visual(frames, grid_thw=torch.tensor([[1, 2, 2]]))


def gradients(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    hidden = backbone.train()(batch)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * weight).sum().backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def test_every_parameter_gets_a_gradient_the_same_with_checkpointing(
    load_tiny: LoadTiny, make_samples: MakeSamples, packed: Packed
) -> None:
    batch = packed(make_samples(IMAGES, targets=True), "eos_bridge")
    backbone, checkpointed = load_tiny().backbone, load_tiny(gradient_checkpointing=True).backbone
    plain = gradients(backbone, batch)
    assert set(plain) == {name for name, _ in backbone.named_parameters()}
    assert [name for name, gradient in plain.items() if not gradient.any()] == []
    calls: list[str] = []
    stock = checkpointed.stock.model
    blocks = {"text": stock.language_model.layers[0], "vision": stock.visual.blocks[0]}
    for name, block in blocks.items():
        block.mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    again = gradients(checkpointed, batch)
    assert sorted(calls) == ["text", "text", "vision", "vision"], "each runs again for backward"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


# --- The image decoder -----------------------------------------------------------------------


@pytest.fixture
def samples(make_samples: MakeSamples) -> list[Sample]:
    masking = Masking(text_ratio=0.3, text_segment="context", patch_ratio=0.5, mask_token_id=0)
    return [masking(sample, np.random.default_rng(0)) for sample in make_samples((2, 0, 1))]


def test_decoder_says_one_frame_for_each_hidden_visual_token(
    loaded: Loaded, processor: Processor, samples: list[Sample], packed: Packed
) -> None:
    backbone, batch = loaded.backbone, packed(samples)
    decoder = ImageDecoder(backbone, patch_values=processor.patch_values)
    hidden = torch.randn(batch.num_tokens, backbone.hidden_size, requires_grad=True)
    pixels = decoder(backbone, hidden, batch)
    assert pixels.shape == (len(batch.patch_rows), 4 * processor.patch_values)
    pixels.sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert hidden.grad is not None
    has_image = torch.tensor([len(sample.grids) > 0 for sample in samples])
    read = torch.repeat_interleave(has_image, batch.segment_lengths.sum(1))
    assert torch.equal(hidden.grad.any(1), read), "samples never see each other"
    stock_layers = backbone.stock.model.language_model.layers
    assert type(decoder.layer) is type(stock_layers[0])
    assert all(decoder.layer is not layer for layer in stock_layers)
    assert "backbone" not in dict(decoder.named_children())
