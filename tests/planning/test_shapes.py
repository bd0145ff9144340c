"""Parameters counted from a configuration are those of the model, of its adapters and its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.published import KNOWN
from cocoa_pl.planning.families import model_shape
from cocoa_pl.planning.shapes import Linear
from cocoa_pl.planning.tuning import (
    Adapter,
    Tuning,
    added_parameters,
    decoder_parameters,
    trained_parameters,
)
from tests.small import meta_model

MakeSmall = Callable[..., Any]
PAPER_TARGETS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.(linear_)?(fc1|fc2)|mlp\.(gate|up|down)_proj)",
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_published_models_have_as_many_parameters_as_are_counted(name: str) -> None:
    config: Any = KNOWN[name].config()
    shape, model = model_shape(config), meta_model(config)
    assert shape.parameters == KNOWN[name].parameters == count(model)
    stock: Any = model
    assert shape.vision.parameters == count(stock.model.visual)
    embedding = shape.vocabulary * shape.text.width
    assert shape.text_parameters == count(stock.model.language_model) - embedding


@pytest.mark.parametrize("name", KNOWN)
def test_every_linear_is_found_by_its_name(name: str) -> None:
    config: Any = KNOWN[name].config()
    shape, modules = model_shape(config), dict(meta_model(config).named_modules())

    def check(linear: Linear, number: int) -> None:
        module: Any = modules[linear.name.format(number)]
        assert (module.in_features, module.out_features) == (linear.fan_in, linear.fan_out)
        assert (module.bias is not None) == linear.bias

    for block in (shape.text, shape.vision.block):
        for linear in block.linears:
            check(linear, 0)
            check(linear, block.count - 1)
    for merger in shape.vision.mergers:
        check(merger.first, 0)
        check(merger.second, 0)


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"],
)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_papers_adapters_have_as_many_parameters_as_are_counted(
    name: str, use_dora: bool
) -> None:
    config: Any = KNOWN[name].config()
    config.text_config.num_hidden_layers, config.vision_config.depth = 3, 2  # the rest is alike
    if hasattr(config.text_config, "layer_types"):
        config.text_config.layer_types = config.text_config.layer_types[:3]
    shape = model_shape(config)
    tuning = Tuning(Adapter(8, 0.1, use_dora, False, True, PAPER_TARGETS))
    assert trained_parameters(shape, Tuning(None)) == shape.parameters
    values = {"rank": 8, "alpha": 64, "dropout": 0.1, "init": "gaussian"}
    adapter: Any = LowRank(
        **values,
        use_dora=use_dora,
        lean_dora=False,
        dropout_on_base=True,
        target_modules=PAPER_TARGETS,
    )

    with torch.device("meta"):
        adapted: Any = peft.get_peft_model(meta_model(config), adapter.config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == trained_parameters(shape, tuning) == added_parameters(shape, tuning)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_image_decoder_has_as_many_parameters_as_are_counted(
    family: str, make_small: MakeSmall
) -> None:
    small = make_small("warmup", family=family)
    assert decoder_parameters(small.shape) == count(small.module.image_decoder)


def test_an_unknown_family_is_refused() -> None:
    config: Any = KNOWN["Qwen/Qwen2-VL-2B-Instruct"].config()
    config.model_type = "another_vl"
    with pytest.raises(UserError, match="no plan for a another_vl model"):
        model_shape(config)
