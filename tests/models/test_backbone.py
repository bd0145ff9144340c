"""Every family's wrapped model against the policy table and against itself one by one; parity with
the stock forward is in `test_stock_parity.py`.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Policy, dense_mask
from cocoa_pl.attention.kernels import KERNELS
from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

ALL = ("context", "eos", "target")
POLICIES = {
    "bidirectional": Policy("bidirectional", ALL, ALL, ALL, False),
    "eos_bridge": Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), False),
    "strict": Policy("strict", ("context", "eos"), ("context", "eos"), ("eos", "target"), False),
    "causal": Policy("causal", ALL, ALL, ALL, True),
}
IMAGES = (1, 0, 2, 0, 1, 2, 1)  # images of each sample; every second sample has a TARGET
MakeSamples = Callable[..., list[Encoded]]


@pytest.fixture(scope="module")
def one_layer(make_source: Any, texts: list[str], load_tiny: Callable[..., Loaded]) -> Backbone:
    """float64 and a single layer: deeper stacks rightly leak through EOS."""
    folder = make_source(num_hidden_layers=1).folder(lambda: texts)
    return load_tiny(folder=folder).backbone.double()


def run(backbone: Backbone, batch: Batch, policy: Policy) -> Tensor:
    with torch.no_grad():
        return backbone(batch, backbone.layouts(policy)(batch))


def assert_close(got: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# --- Who depends on whom ---------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_gradient_dependency_is_the_policy_table(
    name: str, one_layer: Backbone, make_samples: MakeSamples
) -> None:
    batch = pack(make_samples((1, 0, 0, 2), targets=True))
    inputs: list[Tensor] = []

    def keep(_: object, __: object, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["inputs_embeds"])

    language_model = one_layer.stock.model.language_model
    handle = language_model.register_forward_pre_hook(keep, with_kwargs=True)
    hidden = one_layer(batch, one_layer.layouts(POLICIES[name])(batch))
    handle.remove()
    depends = torch.stack(
        [
            torch.autograd.grad(state.sum(), inputs[0], retain_graph=True)[0][0].any(1)
            for state in hidden
        ]
    )
    assert torch.equal(depends, dense_mask(POLICIES[name], batch.segment_lengths))


@pytest.mark.parametrize("name", POLICIES)
def test_pixels_reach_exactly_the_rows_that_see_their_image(
    name: str, one_layer: Backbone, make_samples: MakeSamples
) -> None:
    batch = pack(make_samples((2, 0, 1), targets=True))
    pixels = one_layer.pixels(batch).double().requires_grad_()
    hidden = one_layer(batch, one_layer.layouts(POLICIES[name])(batch), pixels)
    patches = batch.grids.prod(1).tolist()
    depends = torch.stack(
        [
            torch.stack(
                [
                    image.any()
                    for image in torch.autograd.grad(state.sum(), pixels, retain_graph=True)[
                        0
                    ].split(patches)
                ]
            )
            for state in hidden
        ]
    )  # (T, I)
    columns = batch.image_mask.nonzero()[:, 0].split([n // 4 for n in patches])
    mask = dense_mask(POLICIES[name], batch.segment_lengths)
    expected = torch.stack([mask[:, image].any(1) for image in columns], dim=1)
    assert torch.equal(depends, expected)
    assert not expected.all(0).any()


@pytest.mark.parametrize("name", ["eos_bridge", "strict"])
def test_target_never_sees_context_in_one_layer_but_hears_of_it_through_eos_in_two(
    name: str, one_layer: Backbone, loaded: Loaded, make_samples: MakeSamples
) -> None:
    (sample,) = make_samples((1,), targets=True)
    ids = sample.input_ids.clone()
    ids[0] += 1
    changed = dataclasses.replace(sample, input_ids=ids)
    first_target = sample.segment_lengths[0] + 1
    for backbone, hears in ((one_layer, False), (loaded.backbone, True)):
        before = run(backbone, pack([sample]), POLICIES[name])
        after = run(backbone, pack([changed]), POLICIES[name])
        assert not torch.equal(before[:first_target], after[:first_target])
        assert torch.equal(before[first_target:], after[first_target:]) != hears


# --- Packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [True, False], ids=["with targets", "without"])
@pytest.mark.parametrize("name", POLICIES)
def test_packed_equals_one_by_one_in_every_order(
    name: str, targets: bool, loaded: Loaded, make_samples: MakeSamples
) -> None:
    samples = make_samples(IMAGES, targets=targets)
    alone = [run(loaded.backbone, pack([sample]), POLICIES[name]) for sample in samples]
    for seed in range(4):
        order = random.Random(seed).sample(range(len(samples)), len(samples))
        packed = run(loaded.backbone, pack([samples[i] for i in order]), POLICIES[name])
        assert_close(packed, torch.cat([alone[i] for i in order]))


def embed(backbone: Backbone, batch: Batch, policy: Policy) -> Tensor:
    return backbone.embed(batch, backbone.layouts(policy)(batch))


def embed_in_batches(
    backbone: Backbone, samples: Sequence[Encoded], sizes: Sequence[int]
) -> Tensor:
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    assert bounds[-1] == len(samples)
    with torch.no_grad():
        return torch.cat(
            [
                embed(backbone, pack(samples[a:b]), POLICIES["bidirectional"])
                for a, b in pairwise(bounds)
            ]
        )


# bf16 keeps 8 bits, and a padded bucket sums in another order; each layer may round differently.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-6)])
def test_embeddings_do_not_depend_on_batch_size_order_or_neighbours(
    dtype: str, tolerance: float, load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    backbone = load_tiny(dtype=dtype).backbone
    samples = make_samples(IMAGES)
    alone = embed_in_batches(backbone, samples, [1] * 7)
    for sizes in ([7], [3, 4], [2, 2, 2, 1], [6, 1]):
        assert_close(embed_in_batches(backbone, samples, sizes), alone, tolerance=tolerance)
    backwards = embed_in_batches(backbone, samples[::-1], [7]).flip(0)
    assert_close(backwards, alone, tolerance=tolerance)
    other_neighbours = make_samples((2, 1, 0, 0), seed=9)
    among_others = embed_in_batches(backbone, [*other_neighbours, samples[2]], [5])[-1]
    assert_close(among_others, alone[2], tolerance=tolerance)


@pytest.mark.parametrize("name", ["eos_bridge", "causal"])
def test_embedding_is_the_normalised_state_of_eos(
    name: str, loaded: Loaded, make_samples: MakeSamples
) -> None:
    samples = make_samples(IMAGES, targets=True)
    with torch.no_grad():
        embeddings = embed(loaded.backbone, pack(samples), POLICIES[name])
    for sample, embedding in zip(samples, embeddings, strict=True):
        state = run(loaded.backbone, pack([sample]), POLICIES[name])[sample.segment_lengths[0]]
        assert_close(embedding, state / state.norm())


def test_embeddings_are_unit_float32_and_tell_samples_apart(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    backbone = load_tiny(dtype="bfloat16").backbone
    embeddings = embed(backbone, pack(make_samples(IMAGES)), POLICIES["bidirectional"])
    assert embeddings.dtype == torch.float32
    assert_close(embeddings.norm(dim=1), torch.ones(len(IMAGES)))
    similarity = embeddings @ embeddings.T - 2 * torch.eye(len(IMAGES))
    assert similarity.max() < 0.999


# --- Wiring ----------------------------------------------------------------------------------


def test_model_without_a_plan_fails_instead_of_running_causally(
    loaded: Loaded, processor: Processor, make_samples: MakeSamples
) -> None:
    model = loaded.backbone.stock
    (sample,) = make_samples((0,))
    frames = torch.zeros(4, 2 * processor.patch_values)
    with pytest.raises(TypeError, match="plan"):
        model(input_ids=sample.input_ids[None])
    with pytest.raises((TypeError, KeyError), match="plan"):
        model.model.visual(frames, grid_thw=torch.tensor([[1, 2, 2]]))


def test_vision_tower_never_waits_for_the_device(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tensor without values cannot be read back: on a GPU each such reading would be a wait.
    monkeypatch.setitem(KERNELS, "sdpa", lambda q, k, v, plan, scale: q)
    backbone = load_tiny().backbone.to("meta")
    batch = pack(make_samples((1, 0, 2)))
    pixels = torch.empty(batch.patches.shape, device="meta")
    layout = backbone.layouts(POLICIES["bidirectional"])(batch).to(torch.device("meta"))
    tokens = backbone._see(pixels, batch, layout).pooler_output
    assert tokens.shape == (int(batch.image_mask.sum()), backbone.hidden_size)


def gradients(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    backbone.train()
    hidden = backbone(batch, backbone.layouts(POLICIES["eos_bridge"])(batch))
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * weight).sum().backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    batch = pack(make_samples(IMAGES, targets=True))
    plain = gradients(load_tiny().backbone, batch)
    checkpointed_backbone = load_tiny(gradient_checkpointing=True).backbone
    calls: list[str] = []
    stock = checkpointed_backbone.stock.model
    for name, block in (
        ("text", stock.language_model.layers[0]),
        ("vision", stock.visual.blocks[0]),
    ):
        block.mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    checkpointed = gradients(checkpointed_backbone, batch)
    assert sorted(calls) == ["text", "text", "vision", "vision"], "each runs again for backward"
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


READS = {"some": [1, 2, 7, 30], "one": [5], "backwards": [9, 4, 0], "none": []}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rows", READS.values(), ids=READS)
def test_states_that_are_read_are_those_of_all_with_the_same_gradients(
    rows: list[int],
    checkpointing: bool,
    load_tiny: Callable[..., Loaded],
    make_samples: MakeSamples,
) -> None:
    batch, reads = pack(make_samples(IMAGES, targets=True)), torch.tensor(rows, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(rows), 32, generator=generator, dtype=torch.float64)

    def found(*, few: bool) -> tuple[Tensor, dict[str, Tensor]]:
        backbone = load_tiny(gradient_checkpointing=checkpointing).backbone.double().train()
        layout = backbone.layouts(POLICIES["eos_bridge"])(batch)
        states = backbone(batch, layout, reads=reads if few else None)
        states = states if few else states[reads]
        (states * weight).sum().backward()
        return states, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}

    (states, gradients), (expected, every) = found(few=True), found(few=False)
    torch.testing.assert_close(states, expected)
    assert gradients.keys() == every.keys()
    for name, gradient in every.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_the_last_perceptron_runs_on_the_rows_that_are_read(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    backbone, batch = load_tiny().backbone, pack(make_samples(IMAGES))
    rows: list[int] = []
    for layer in backbone.stock.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    embeddings = embed(backbone, batch, POLICIES["bidirectional"])
    assert rows == [batch.num_tokens, len(embeddings)]


def test_batch_without_images_leaves_the_vision_tower_without_gradients(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    backbone = load_tiny(gradient_checkpointing=True).backbone
    found = gradients(backbone, pack(make_samples((0, 0), targets=True)))
    text = {name for name, _ in backbone.named_parameters() if ".visual." not in name}
    assert set(found) == text
    assert [name for name, gradient in found.items() if not gradient.any()] == []


def test_every_parameter_gets_a_gradient(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    backbone = load_tiny().backbone
    found = gradients(backbone, pack(make_samples(IMAGES, targets=True)))
    assert set(found) == {name for name, _ in backbone.named_parameters()}
    assert [name for name, gradient in found.items() if not gradient.any()] == []


def test_a_layer_of_its_own_runs_by_the_plan(loaded: Loaded, make_samples: MakeSamples) -> None:
    samples = make_samples((1, 0, 2))
    layer = loaded.backbone.decoder_layer()
    stock_layers = loaded.backbone.stock.model.language_model.layers
    assert isinstance(layer, type(stock_layers[0]))
    assert all(layer is not other for other in stock_layers)

    def run_layer(batch: Batch, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        layout = loaded.backbone.layouts(POLICIES["bidirectional"])(batch)
        reads = torch.arange(batch.num_tokens) if rows is None else rows
        with torch.no_grad():
            return loaded.backbone.run_layer(layer, hidden, batch, layout, reads)

    batch = pack(samples)
    hidden = torch.randn(batch.num_tokens, loaded.backbone.hidden_size)
    pieces = hidden.split(batch.lengths.tolist())
    alone = [run_layer(pack([s]), piece) for s, piece in zip(samples, pieces, strict=True)]
    assert_close(run_layer(batch, hidden), torch.cat(alone))
    few = torch.tensor([0, 3, batch.num_tokens - 1])
    assert_close(run_layer(batch, hidden, few), torch.cat(alone)[few])


def test_unknown_kernel_is_refused_by_name(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"unknown attention kernel 'fast'.*sdpa"):
        type(loaded.backbone)(
            loaded.backbone.model, kernel="fast", image_mean=[0], image_std=[1], rescale_factor=1.0
        )
