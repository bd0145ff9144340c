"""Every family's wrapped model against the stock one: states, logits, positions, pixels."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from cocoa_pl.data.batch import VISUAL, Batch, Sample
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.models.loading import FAMILIES, Loaded

pytestmark = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")

MakeItem = Callable[..., Item]
MakeImage = Callable[..., Image.Image]
Packed = Callable[..., Batch]


@pytest.fixture(scope="module")
def stock(tiny_folder: Path) -> Any:
    # Eager: without padding the stock mask is None, which stock sdpa takes for causal.
    return AutoModelForImageTextToText.from_pretrained(
        tiny_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def assert_close(got: Tensor, expected: Tensor) -> None:
    # Patches are embedded by a product, which adds up in another order than a convolution.
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)


def sample_of(processor: Processor, item: Item, target: str | None = None) -> Sample:
    return processor(item, target, key=0, row_id="toy")


def stock_inputs(sample: Sample, processor: Processor, item: Item) -> dict[str, Tensor]:
    """What the model's own processor would hand over, for one sample."""
    inputs = {
        "input_ids": torch.from_numpy(sample.input_ids)[None],
        "mm_token_type_ids": torch.from_numpy(sample.kinds == VISUAL)[None].int(),
        "attention_mask": torch.ones(1, sample.num_tokens, dtype=torch.int64),
    }
    if item.media:
        inputs |= processor.image_processor(list(item.media), return_tensors="pt")
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("policy", ["causal", "bidirectional"])
@pytest.mark.parametrize("images", [0, 2, "large"])
def test_states_and_logits_equal_the_stock_ones(
    images: int | str,
    policy: str,
    loaded: Loaded,
    stock: Any,
    packed: Packed,
    make_processor: Callable[..., Processor],
    make_item: MakeItem,
    make_image: MakeImage,
    token_side: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = make_processor()
    if images == "large":
        # Visual tokens, width x height: where the tower has windows, whole ones and cut ones.
        sizes = [(5, 7), (4, 4), (8, 3), (1, 1)]
        pictures = [make_image((token_side * w, token_side * h), seed=w) for w, h in sizes]
        item = Item("a {0} and {0}{0} then {0}".replace("{0}", IMAGE_SLOT), tuple(pictures))
        processor = make_processor(max_pixels=64 * token_side**2)
        bounds = {"shortest_edge": 1, "longest_edge": 64 * token_side**2}
        monkeypatch.setattr(processor.image_processor, "size", bounds)
    else:
        item = make_item(images, images=images)
    sample = sample_of(processor, item)
    hidden = loaded.backbone(packed([sample], policy))
    states = {}
    for causal in (True, False):
        monkeypatch.setattr(stock.config.text_config, "is_causal", causal, raising=False)
        states[causal] = stock(**stock_inputs(sample, processor, item), output_hidden_states=True)
    expected = states[policy == "causal"]
    assert_close(hidden, expected.hidden_states[-1][0])
    assert_close(loaded.backbone.vocabulary(hidden), expected.logits[0])
    assert (states[True].logits - states[False].logits).abs().max() > 1e-3


def test_the_patch_embedding_is_the_stock_convolution_as_one_product(
    family: str, load_tiny: Callable[..., Loaded], stock: Any
) -> None:
    """A convolution is in TF32 on a GPU, whatever was asked for."""
    theirs = copy.deepcopy(stock.model.visual.patch_embed).double()
    ours = load_tiny().backbone.stock.model.visual.patch_embed.double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert (ours.proj.bias is not None) == (family == "qwen3_vl")
    patches = torch.randn(50, theirs.proj.weight[0].numel(), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        found = ours(patches.requires_grad_())
    assert not any("conv" in str(op) for op in counter.get_flop_counts()["Global"])
    expected = theirs(patches)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((states * weight).sum(), [patches, *embed.parameters()])
        for states, embed in ((found, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 9), (100, 41), (300, 200), (1, 150)])
def test_pixels_are_bit_equal_to_the_image_processor(
    size: tuple[int, int],
    loaded: Loaded,
    processor: Processor,
    packed: Packed,
    make_image: MakeImage,
) -> None:
    item = Item(f"{IMAGE_SLOT} and {IMAGE_SLOT}", (make_image(size), make_image((56, 28), seed=1)))
    batch = packed([sample_of(processor, item)])
    expected = processor.image_processor(list(item.media), return_tensors="pt")
    assert torch.equal(batch.grids, expected["image_grid_thw"])
    patches = len(batch.patches)
    frames = expected["pixel_values"].view(patches, 3, 2, -1)  # channels, temporal copies
    for copy_of_frame in frames.unbind(2):
        assert torch.equal(loaded.backbone.pixels(batch).view(patches, 3, -1), copy_of_frame)
