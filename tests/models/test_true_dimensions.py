"""The published dimensions with few layers and few tokens, against the stock forward: head sizes,
rotary sections, windows and position tables that tiny models have not.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import TEXT_ATTENTION, Policy
from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES
from cocoa_pl.models.published import KNOWN
from cocoa_pl.positions import mrope_positions

ALL = ("context", "eos", "target")
CAUSAL = Policy("causal", ALL, ALL, ALL, True)
BIDIRECTIONAL = Policy("bidirectional", ALL, ALL, ALL, False)
IMAGE_TOKEN, EOS, ROWS = 100, 101, 128
# Visual tokens, height x width: 336 x 224 pixels or a little more, and one that is a cut window.
IMAGES = ((12, 8), (3, 5))


def shallow(name: str) -> Any:
    """The published configuration with one text layer, two vision blocks and 128 tokens."""
    config: Any = KNOWN[name].config()
    config.dtype = torch.float32
    config.image_token_id, config.video_token_id = IMAGE_TOKEN, IMAGE_TOKEN + 5
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.num_hidden_layers, text.bos_token_id, text.eos_token_id = ROWS, 1, 0, EOS
    text.pad_token_id = None
    if "layer_types" in text.to_dict():
        text.layer_types = text.layer_types[:1]
    vision.depth = 2
    if "fullatt_block_indexes" in vision.to_dict():
        vision.fullatt_block_indexes = [1]
    if "deepstack_visual_indexes" in vision.to_dict():
        vision.deepstack_visual_indexes = [0]
    return config


def wrapped(stock: Any) -> Backbone:
    family = FAMILIES[stock.config.model_type]
    return family(
        stock,
        kernel="sdpa",
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rescale_factor=1 / 255,
    )


def sample(patch_size: int) -> Encoded:
    """Text, an image, text, another image, text and EOS, with random content."""
    generator = torch.Generator().manual_seed(0)
    ids: list[Tensor] = []
    spans: list[int | tuple[int, int, int]] = []
    for height, width in IMAGES:
        ids += [torch.randint(0, 90, (4,), generator=generator)]
        ids += [torch.full((height * width,), IMAGE_TOKEN)]
        spans += [4, (1, 2 * height, 2 * width)]
    ids.append(torch.tensor([7, 8, EOS]))
    input_ids = torch.cat(ids)
    grids = torch.tensor([span for span in spans if not isinstance(span, int)])
    patches = torch.randint(
        0, 256, (int(grids.prod(1).sum()), 3 * patch_size**2), generator=generator
    )
    image_mask = input_ids == IMAGE_TOKEN
    return Encoded(
        input_ids=input_ids,
        position_ids=mrope_positions([*spans, 3], merge_size=2),
        text_mask=~image_mask,
        image_mask=image_mask,
        segment_lengths=(len(input_ids) - 1, 1, 0),
        patches=patches.to(torch.uint8),
        grids=grids,
        key=0,
        seed=0,
        row_id="toy",
    )


def stock_states(stock: Any, batch: Batch, pixels: Tensor) -> Tensor:
    frames = pixels.view(len(pixels), 3, 1, -1).expand(-1, -1, 2, -1).flatten(1)
    states: Tensor = stock.model(
        input_ids=batch.input_ids[None],
        mm_token_type_ids=batch.image_mask[None].int(),
        attention_mask=torch.ones_like(batch.input_ids)[None],
        pixel_values=frames,
        image_grid_thw=batch.grids,
    ).last_hidden_state[0]
    return states


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_states_equal_the_stock_ones(name: str) -> None:
    config = shallow(name)
    torch.manual_seed(0)
    stock: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    batch = pack([sample(config.vision_config.patch_size)])
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # at the usual 0.02 attention hardly moves anything
        pixels = batch.patches / 127.5 - 1
        expected = {}
        for policy in (CAUSAL, BIDIRECTIONAL):
            stock.config.text_config.is_causal = policy.causal
            expected[policy.name] = stock_states(stock, batch, pixels)
        stock.set_attn_implementation(TEXT_ATTENTION)
        backbone = wrapped(stock)  # changes the stock model: from here on it follows plans
        for policy in (CAUSAL, BIDIRECTIONAL):
            found = backbone(batch, backbone.layouts(policy)(batch), pixels)
            scale = expected[policy.name].abs().max()
            difference = (found - expected[policy.name]).abs().max() / scale
            assert difference < 1e-5, policy.name
    assert (expected["causal"] - expected["bidirectional"]).abs().max() / scale > 1e-3
