"""The wrapped model against the policy table, against itself one by one, and against the stock
Hugging Face forward.
"""

import copy
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import Policy, dense_mask, make_plan
from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.items import IMAGE_SLOT, Item
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from cocoa_pl.positions import mrope_positions

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
    folder = make_source(num_hidden_layers=1).folder(texts)
    return load_tiny(folder=folder).backbone.double()


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> Any:
    return load_stock(tiny_folder, attn_implementation="sdpa")


def load_stock(folder: Path, *, attn_implementation: str) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attn_implementation
    )
    return model.eval()


def run(backbone: Backbone, batch: Batch, policy: Policy) -> Tensor:
    with torch.no_grad():
        return backbone(batch, make_plan(policy, batch.segment_lengths))


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
    hidden = one_layer(batch, make_plan(POLICIES[name], batch.segment_lengths))
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
    hidden = one_layer(batch, make_plan(POLICIES[name], batch.segment_lengths), pixels)
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
    changed = copy.copy(sample)
    ids = sample.input_ids.clone()
    ids[0] += 1
    object.__setattr__(changed, "input_ids", ids)
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


def embed_in_batches(
    backbone: Backbone, samples: Sequence[Encoded], sizes: Sequence[int]
) -> Tensor:
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    assert bounds[-1] == len(samples)
    with torch.no_grad():
        return torch.cat(
            [
                backbone.embed(pack(samples[a:b]), POLICIES["bidirectional"])
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


def test_embeddings_are_unit_float32_and_tell_samples_apart(
    load_tiny: Callable[..., Loaded], make_samples: MakeSamples
) -> None:
    backbone = load_tiny(dtype="bfloat16").backbone
    embeddings = backbone.embed(pack(make_samples(IMAGES)), POLICIES["bidirectional"])
    assert embeddings.dtype == torch.float32
    assert_close(embeddings.norm(dim=1), torch.ones(len(IMAGES)))
    similarity = embeddings @ embeddings.T - 2 * torch.eye(len(IMAGES))
    assert similarity.max() < 0.999


# --- The stock forward -----------------------------------------------------------------------


def stock_inputs(batch: Batch, processor: Processor, item: Item) -> dict[str, Tensor]:
    """What the model's own processor would hand over, for one sample."""
    inputs = {
        "input_ids": batch.input_ids[None],
        "mm_token_type_ids": batch.image_mask[None].int(),
        "attention_mask": torch.ones_like(batch.input_ids)[None],
    }
    if item.images:
        images = processor.image_processor(list(item.images), return_tensors="pt")
        inputs["pixel_values"] = images["pixel_values"]
        inputs["image_grid_thw"] = images["image_grid_thw"]
    return inputs


@pytest.mark.parametrize("images", [0, 1, 2])
def test_causal_policy_equals_the_stock_forward(
    images: int, loaded: Loaded, stock: Any, processor: Processor, make_item: Callable[..., Item]
) -> None:
    item = make_item(images, images=images)
    batch = pack([processor.encode(item, None, key=0, seed=0, row_id="toy")])
    inputs = stock_inputs(batch, processor, item)
    hidden = run(loaded.backbone, batch, POLICIES["causal"])
    with torch.no_grad():
        assert_close(hidden, stock.model(**inputs).last_hidden_state[0])
        assert_close(loaded.backbone.vocabulary(hidden), stock(**inputs).logits[0])


@pytest.mark.parametrize("images", [0, 1, 2])
def test_bidirectional_policy_equals_the_stock_forward_that_is_not_causal(
    images: int,
    loaded: Loaded,
    tiny_folder: Path,
    processor: Processor,
    make_item: Callable[..., Item],
) -> None:
    # Eager: without padding the stock mask is None, which stock sdpa takes for causal.
    stock = load_stock(tiny_folder, attn_implementation="eager")
    item = make_item(images, images=images)
    batch = pack([processor.encode(item, None, key=0, seed=0, row_id="toy")])
    inputs = stock_inputs(batch, processor, item)
    hidden = run(loaded.backbone, batch, POLICIES["bidirectional"])
    with torch.no_grad():
        causal = stock.model(**inputs).last_hidden_state[0]
        stock.config.text_config.is_causal = False
        assert_close(hidden, stock.model(**inputs).last_hidden_state[0])
    assert (hidden - causal).abs().max() > 1e-3


def test_stock_forward_of_padded_batches_gives_the_same_packed_states(
    loaded: Loaded, stock: Any, processor: Processor, make_item: Callable[..., Item]
) -> None:
    items = [make_item(seed, images=1) for seed in range(3)]
    batch = pack([processor.encode(i, None, key=0, seed=0, row_id="toy") for i in items])
    pieces = [batch.select(i, i + 1) for i in range(3)]
    longest = int(batch.lengths.max())

    def padded(values: Sequence[Tensor]) -> Tensor:  # on the left, as for generation
        return torch.stack([torch.cat([v.new_zeros(longest - len(v)), v]) for v in values])

    pictures = processor.image_processor([i.images[0] for i in items], return_tensors="pt")
    with torch.no_grad():
        output = stock.model(
            input_ids=padded([p.input_ids for p in pieces]),
            attention_mask=padded([torch.ones_like(p.input_ids) for p in pieces]),
            mm_token_type_ids=padded([p.image_mask.int() for p in pieces]),
            **pictures,
        ).last_hidden_state
    hidden = run(loaded.backbone, batch, POLICIES["causal"])
    expected = [rows[-p.num_tokens :] for rows, p in zip(output, pieces, strict=True)]
    assert_close(hidden, torch.cat(expected))


LAYOUTS: dict[str, list[int | tuple[int, int, int]]] = {
    "text only": [7],
    "image first": [(1, 4, 4), 5],
    "image last": [5, (1, 4, 4)],
    "image alone": [(1, 2, 2)],
    "wide": [3, (1, 2, 12), 2],
    "tall": [3, (1, 12, 2), 2],
    "several": [2, (1, 4, 6), 1, (1, 2, 2), 4, (1, 8, 4), 1],
    "video-like": [2, (3, 4, 6), 3],
}


def random_layout(seed: int) -> list[int | tuple[int, int, int]]:
    rng = random.Random(seed)
    layout: list[int | tuple[int, int, int]] = [rng.randint(1, 9)]
    for _ in range(rng.randint(1, 4)):
        layout += [(1, 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)), rng.randint(1, 9)]
    return layout


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS.values(), *map(random_layout, range(12))],
    ids=[*LAYOUTS, *(f"random {seed}" for seed in range(12))],
)
def test_mrope_positions_equal_the_stock_ones(
    layout: list[int | tuple[int, int, int]], stock: Any
) -> None:
    kinds: list[int] = []
    grids = [span for span in layout if not isinstance(span, int)]
    for span in layout:
        kinds += [0] * span if isinstance(span, int) else [1] * (span[0] * span[1] * span[2] // 4)
    expected, _ = stock.model.get_rope_index(
        input_ids=torch.zeros(1, len(kinds), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(grids).view(-1, 3),
    )
    assert torch.equal(mrope_positions(layout, merge_size=2), expected[:, 0])


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_positions_of_encoded_items_equal_the_stock_ones(
    images: int, stock: Any, processor: Processor, make_item: Callable[..., Item]
) -> None:
    item = make_item(images, images=images)
    sample = processor.encode(item, "two boats", key=0, seed=0, row_id="toy")
    expected, _ = stock.model.get_rope_index(
        input_ids=sample.input_ids[None],
        mm_token_type_ids=sample.image_mask[None].int(),
        image_grid_thw=sample.grids,
    )
    assert torch.equal(sample.position_ids, expected[:, 0])


@pytest.mark.parametrize("size", [(28, 28), (5, 9), (30, 90), (100, 41), (300, 200), (1, 150)])
def test_pixels_are_bit_equal_to_the_image_processor(
    size: tuple[int, int],
    loaded: Loaded,
    processor: Processor,
    make_image: Callable[..., Image.Image],
) -> None:
    item = Item(f"{IMAGE_SLOT} and {IMAGE_SLOT}", (make_image(size), make_image((56, 28), seed=1)))
    batch = pack([processor.encode(item, None, key=0, seed=0, row_id="toy")])
    expected = processor.image_processor(list(item.images), return_tensors="pt")
    assert torch.equal(batch.grids, expected["image_grid_thw"])
    patches = len(batch.patches)
    frames = expected["pixel_values"].view(patches, 3, 2, -1)  # channels, temporal copies
    for copy_of_frame in frames.unbind(2):
        assert torch.equal(loaded.backbone.pixels(batch).view(patches, 3, -1), copy_of_frame)


def test_every_byte_is_normalised_as_by_the_image_processor(loaded: Loaded) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    image = Image.fromarray(levels[:, :, None].expand(-1, -1, 3).contiguous().numpy())
    pixels = loaded.image_processor(
        [image.resize((28, 28), Image.Resampling.NEAREST)], return_tensors="pt"
    )["pixel_values"]
    values = pixels.view(len(pixels), 3, -1).transpose(0, 1).flatten(1)
    for channel, expected in zip(loaded.backbone.byte_values, values, strict=True):
        assert torch.equal(channel.unique(), expected.unique())


# --- Wiring ----------------------------------------------------------------------------------


def test_model_without_a_plan_fails_instead_of_running_causally(
    loaded: Loaded, make_samples: MakeSamples
) -> None:
    model = loaded.backbone.stock
    (sample,) = make_samples((0,))
    with pytest.raises(TypeError, match="plan"):
        model(input_ids=sample.input_ids[None])
    with pytest.raises(TypeError, match="plan"):
        model.model.visual(torch.zeros(4, 2 * 3 * 14 * 14), grid_thw=torch.tensor([[1, 2, 2]]))


def gradients(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    backbone.train()
    plan = make_plan(POLICIES["eos_bridge"], batch.segment_lengths)
    hidden = backbone(batch, plan)
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
    assert type(layer) is type(stock_layers[0])
    assert all(layer is not other for other in stock_layers)

    def run_layer(batch: Batch, hidden: Tensor) -> Tensor:
        plan = make_plan(POLICIES["bidirectional"], batch.segment_lengths)
        with torch.no_grad():
            return loaded.backbone.run_layer(layer, hidden, batch, plan)

    batch = pack(samples)
    hidden = torch.randn(batch.num_tokens, loaded.backbone.hidden_size)
    pieces = hidden.split(batch.lengths.tolist())
    alone = [run_layer(pack([s]), piece) for s, piece in zip(samples, pieces, strict=True)]
    assert_close(run_layer(batch, hidden), torch.cat(alone))


def test_unknown_kernel_is_refused_by_name(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"unknown attention kernel 'fast'.*sdpa"):
        Backbone(
            loaded.backbone.model, kernel="fast", image_mean=[0], image_std=[1], rescale_factor=1.0
        )
