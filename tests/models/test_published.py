"""The published architectures: sizes, reserved rows and what adapters hit, on the meta device; and
parity with the stock forward.
"""

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from cocoa_pl.attention import TEXT_ATTENTION, Policy
from cocoa_pl.data.batch import TEXT as TEXT_KIND
from cocoa_pl.data.batch import VISUAL, Sample, pack
from cocoa_pl.data.processor import mrope_positions
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, KNOWN, find_config, published_config
from tests.configs import composed
from tests.small import meta_model

CONF = Path(__file__).parents[2] / "conf"
TEXT = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# The linear layers of one vision block that are adapted, by family; `attn.proj` is not.
VISION = {
    "qwen2_vl": ("attn.qkv", "mlp.fc1", "mlp.fc2"),
    "qwen2_5_vl": ("attn.qkv", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3_vl": ("attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2"),
}
# Language model layers and vision blocks.
DEPTHS = {
    "Qwen/Qwen2-VL-2B-Instruct": (28, 32),
    "Qwen/Qwen2-VL-7B-Instruct": (28, 32),
    "Qwen/Qwen2.5-VL-3B-Instruct": (36, 32),
    "Qwen/Qwen2.5-VL-7B-Instruct": (28, 32),
    "Qwen/Qwen3-VL-2B-Instruct": (28, 24),
    "Qwen/Qwen3-VL-4B-Instruct": (36, 24),
    "Qwen/Qwen3-VL-8B-Instruct": (36, 27),
}
everywhere = pytest.mark.parametrize("name", KNOWN)


@cache
def model_of(name: str) -> nn.Module:
    return meta_model(published_config(name))


@cache
def adapter_of(name: str) -> Any:
    return instantiate(composed(f"adapter={name}").adapter, _convert_="all")


def modules_hit(model: nn.Module, adapter: LowRank) -> set[str]:
    names = [name for name, _ in model.named_modules()]
    return {n for n in names if any(re.fullmatch(e, n) for e in adapter.target_modules)}


def test_every_published_model_has_a_file_and_every_file_a_published_model() -> None:
    files = [yaml.safe_load(file.read_text()) for file in (CONF / "model").glob("*.yaml")]
    assert {file["source"]["path"] for file in files if "path" in file["source"]} == set(KNOWN)


@everywhere
def test_parameters_are_as_many_as_published(name: str) -> None:
    model = model_of(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == KNOWN[name]["parameters"]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@everywhere
def test_last_row_is_reserved_so_nothing_is_resized(name: str) -> None:
    model: Any = model_of(name)
    rows, _ = model.get_input_embeddings().weight.shape
    mask_id = rows - 1  # as the tokenizing processor takes it
    assert mask_id >= KNOWN[name]["num_tokens"]
    config = model.config
    special = (config.image_token_id, config.video_token_id, config.text_config.eos_token_id)
    assert max(special) < KNOWN[name]["num_tokens"]
    assert model.get_output_embeddings().weight.shape[0] == rows


@everywhere
def test_adapters_hit_exactly_the_layers_meant(name: str) -> None:
    model: Any = model_of(name)
    layers, blocks = DEPTHS[name]
    hit = modules_hit(model, adapter_of("dora"))
    assert adapter_of("lora").target_modules == adapter_of("dora").target_modules
    text, vision = "model.language_model.layers", "model.visual.blocks"
    expected = [f"{text}.{i}.{kind}" for i in range(layers) for kind in TEXT]
    expected += [f"{vision}.{i}.{kind}" for i in range(blocks) for kind in VISION[family(name)]]
    assert hit == set(expected)
    assert len(hit) == 7 * layers + len(VISION[family(name)]) * blocks
    assert all(isinstance(model.get_submodule(module), nn.Linear) for module in hit)


def family(name: str) -> str:
    return str(published_config(name).model_type)


# --- Where a configuration comes from --------------------------------------------------------


def test_hub_cache_comes_before_the_table(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--Qwen--Qwen3-VL-2B-Instruct"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1f00")
    shutil.copytree(tiny_folder, cached / "snapshots" / "1f00")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found: Any = find_config("Qwen/Qwen3-VL-2B-Instruct")
    assert found.text_config.hidden_size == 32
    assert found.model_type == find_config(str(tiny_folder)).model_type
    assert find_config("Qwen/Qwen3-VL-4B-Instruct").to_dict() == (
        published_config("Qwen/Qwen3-VL-4B-Instruct").to_dict()
    )


@pytest.mark.parametrize("path", ["Qwen/unknown", "nowhere", "./nowhere", "a b/c"])
def test_unknown_model_is_refused_with_those_known(path: str) -> None:
    with pytest.raises(UserError, match=rf"no config\.json for {path}.*Qwen/Qwen3-VL-8B-Instruct"):
        find_config(path)


# --- Their dimensions, with few layers and few tokens, against the stock forward: head sizes,
# rotary sections, windows and position tables that tiny models have not.

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
        kinds=np.where(np.array(ids) == IMAGE_TOKEN, VISUAL, TEXT_KIND).astype(np.uint8),
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
@everywhere
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
