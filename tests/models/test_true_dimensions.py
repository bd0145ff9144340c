"""The published dimensions with few layers and few tokens, against the stock forward: head sizes,
rotary sections, windows and position tables that tiny models have not.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import TEXT_ATTENTION, Policy
from cocoa_pl.data.batch import TEXT, VISUAL, Sample, pack
from cocoa_pl.data.processor import mrope_positions
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, KNOWN, published_config

IMAGE_TOKEN, EOS, ROWS = 100, 101, 128
# Visual tokens, height x width: 336 x 224 pixels or a little more, and one that is a cut window.
IMAGES = ((12, 8), (3, 5))


def shallow(name: str) -> Any:
    """The published configuration with one text layer, two vision blocks and 128 tokens."""
    config: Any = published_config(name)
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
    halves = family.image_processor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return family(stock, halves, kernel="sdpa")


def sample(patch_size: int) -> Sample:
    """Text, an image, text, another image, text and EOS, with random content."""
    rng = np.random.default_rng(0)
    ids: list[int] = []
    spans: list[int | tuple[int, int, int]] = []
    for height, width in IMAGES:
        ids += [*rng.integers(0, 90, 4).tolist(), *[IMAGE_TOKEN] * (height * width)]
        spans += [4, (1, 2 * height, 2 * width)]
    ids += [7, 8, EOS]
    patches = 4 * ids.count(IMAGE_TOKEN)
    return Sample(
        input_ids=np.array(ids),
        kinds=np.where(np.array(ids) == IMAGE_TOKEN, VISUAL, TEXT).astype(np.uint8),
        position_ids=mrope_positions([*spans, 3], merge_size=2),
        segment_lengths=(len(ids) - 1, 1, 0),
        patches=rng.integers(0, 256, (patches, 3 * patch_size**2), np.uint8),
        grids=tuple(span for span in spans if not isinstance(span, int)),
        key=0,
        row_id="toy",
    )


def stock_states(stock: Any, row: Sample) -> Tensor:
    ids = torch.from_numpy(row.input_ids)[None]
    pixels = torch.from_numpy(row.patches) / 127.5 - 1
    states: Tensor = stock.model(
        input_ids=ids,
        mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels.view(len(pixels), 3, 1, -1).expand(-1, -1, 2, -1).flatten(1),
        image_grid_thw=torch.tensor(row.grids),
    ).last_hidden_state[0]
    return states


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_states_equal_the_stock_ones(name: str, policies: dict[str, Policy]) -> None:
    config = shallow(name)
    torch.manual_seed(0)
    stock: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    for parameter in stock.parameters():
        if parameter.ndim > 1:
            parameter.mul_(2)  # at the usual 0.02 attention hardly moves anything
    row = sample(config.vision_config.patch_size)
    expected = {}
    for policy in ("causal", "bidirectional"):
        stock.config.text_config.is_causal = policies[policy].causal
        expected[policy] = stock_states(stock, row)
    stock.set_attn_implementation(TEXT_ATTENTION)
    backbone = wrapped(stock)  # changes the stock model: from here on it follows plans
    for policy, states in expected.items():
        batch = pack([row], backbone.planner(policies[policy]))
        scale = states.abs().max()
        assert (backbone(batch) - states).abs().max() / scale < 1e-5, policy
    assert (expected["causal"] - expected["bidirectional"]).abs().max() / scale > 1e-3
