"""Every family's wrapped model against the stock one: states, logits, positions, pixels."""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Batch, pack
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded
from cocoa_pl.positions import mrope_positions

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

ALL = ("context", "eos", "target")
CAUSAL = Policy("causal", ALL, ALL, ALL, True)
BIDIRECTIONAL = Policy("bidirectional", ALL, ALL, ALL, False)


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
        return backbone(batch, backbone.layouts(policy)(batch))


def assert_close(got: Tensor, expected: Tensor) -> None:
    # Patches are embedded by a product, which adds up in another order than a convolution.
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)


def stock_inputs(batch: Batch, processor: Processor, item: Item) -> dict[str, Tensor]:
    """What the model's own processor would hand over, for one sample."""
    inputs = {
        "input_ids": batch.input_ids[None],
        "mm_token_type_ids": batch.image_mask[None].int(),
        "attention_mask": torch.ones_like(batch.input_ids)[None],
    }
    if item.media:
        images = processor.image_processor(list(item.media), return_tensors="pt")
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
    hidden = run(loaded.backbone, batch, CAUSAL)
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
    hidden = run(loaded.backbone, batch, BIDIRECTIONAL)
    with torch.no_grad():
        causal = stock.model(**inputs).last_hidden_state[0]
        stock.config.text_config.is_causal = False
        assert_close(hidden, stock.model(**inputs).last_hidden_state[0])
    assert (hidden - causal).abs().max() > 1e-3


@pytest.mark.parametrize("policy", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_large_images_of_several_sizes_equal_the_stock_forward(
    policy: Policy,
    loaded: Loaded,
    tiny_folder: Path,
    make_processor: Callable[..., Processor],
    make_image: Callable[..., Image.Image],
    token_side: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Visual tokens, width x height: where the tower has windows, whole ones and cut ones.
    sizes = [(5, 7), (4, 4), (8, 3), (1, 1)]
    images = [make_image((token_side * w, token_side * h), seed=w) for w, h in sizes]
    processor = make_processor(max_pixels=64 * token_side**2)
    item = Item("a {0} and {0}{0} then {0}".replace("{0}", IMAGE_SLOT), tuple(images))
    batch = pack([processor.encode(item, None, key=0, seed=0, row_id="toy")])
    assert (batch.grids[:, 1:].flip(1) // 2).tolist() == [list(size) for size in sizes]
    bounds = {"shortest_edge": 1, "longest_edge": 64 * token_side**2}
    monkeypatch.setattr(processor.image_processor, "size", bounds)
    stock = load_stock(tiny_folder, attn_implementation="eager")
    stock.config.text_config.is_causal = policy.causal
    hidden = run(loaded.backbone, batch, policy)
    with torch.no_grad():
        inputs = stock_inputs(batch, processor, item)
        assert_close(hidden, stock.model(**inputs).last_hidden_state[0])


def test_stock_forward_of_padded_batches_gives_the_same_packed_states(
    loaded: Loaded, stock: Any, processor: Processor, make_item: Callable[..., Item]
) -> None:
    items = [make_item(seed, images=1) for seed in range(3)]
    batch = pack([processor.encode(i, None, key=0, seed=0, row_id="toy") for i in items])
    pieces = [batch.select(i, i + 1) for i in range(3)]
    longest = int(batch.lengths.max())

    def padded(values: Sequence[Tensor]) -> Tensor:  # on the left, as for generation
        return torch.stack([torch.cat([v.new_zeros(longest - len(v)), v]) for v in values])

    pictures = processor.image_processor([i.media[0] for i in items], return_tensors="pt")
    with torch.no_grad():
        output = stock.model(
            input_ids=padded([p.input_ids for p in pieces]),
            attention_mask=padded([torch.ones_like(p.input_ids) for p in pieces]),
            mm_token_type_ids=padded([p.image_mask.int() for p in pieces]),
            **pictures,
        ).last_hidden_state
    hidden = run(loaded.backbone, batch, CAUSAL)
    expected = [rows[-p.num_tokens :] for rows, p in zip(output, pieces, strict=True)]
    assert_close(hidden, torch.cat(expected))


def test_the_patch_embedding_is_the_stock_convolution_as_one_product(
    family: str, load_tiny: Callable[..., Loaded], stock: Any
) -> None:
    theirs = copy.deepcopy(stock.model.visual.patch_embed).double()
    ours = load_tiny().backbone.stock.model.visual.patch_embed.double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert (ours.proj.bias is not None) == (family == "qwen3_vl")
    patches = torch.randn(50, theirs.proj.weight[0].numel(), dtype=torch.float64)
    found, expected = (embed(patches.requires_grad_()) for embed in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((states * weight).sum(), [patches, *embed.parameters()])
        for states, embed in ((found, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_nothing_is_convolved(
    loaded: Loaded, processor: Processor, make_item: Callable[..., Item]
) -> None:
    """A convolution is in TF32 on a GPU, whatever was asked for."""
    batch = pack([processor.encode(make_item(1, images=1), None, key=0, seed=0, row_id="toy")])
    with FlopCounterMode(display=False) as counter:
        run(loaded.backbone, batch, CAUSAL)
    assert {str(op) for op in counter.get_flop_counts()["Global"]} >= {"aten.mm"}
    assert not any("conv" in str(op) for op in counter.get_flop_counts()["Global"])


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
    expected = processor.image_processor(list(item.media), return_tensors="pt")
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
