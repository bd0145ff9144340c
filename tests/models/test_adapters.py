"""LoRA and DoRA on the tiny models: sizes, dtypes, merging."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Batch, Encoded, pack
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import (
    FullTuning,
    LowRank,
    check_trained,
    merged,
    trainable_line,
)
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded

ALL = ("context", "eos", "target")
POLICY = Policy("bidirectional", ALL, ALL, ALL, False)
CONF = Path(__file__).parents[2] / "conf"
TARGETS = [
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.(linear_)?fc\d|mlp\.(gate|up|down)_proj)",
]
# in and out features of the adapted layers of the tiny models: 2 text layers, 2 vision blocks
TEXT = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
VISION = {
    "qwen2_vl": [(32, 96), (32, 64), (64, 32)],
    "qwen2_5_vl": [(32, 96), (32, 64), (32, 64), (64, 32)],
    "qwen3_vl": [(32, 96), (32, 64), (64, 32)],
}
every_family = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")
LoadTiny = Callable[..., Loaded]


def low_rank(*, use_dora: bool, targets: list[str] = TARGETS) -> LowRank:
    return LowRank(
        lean_dora=False,
        dropout_on_base=True,
        rank=2,
        alpha=8,
        dropout=0.1,
        init="gaussian",
        use_dora=use_dora,
        target_modules=targets,
    )


def adapted(load_tiny: LoadTiny, *, use_dora: bool, dtype: str = "float32") -> Backbone:
    """With random `B`, as after some training."""
    backbone = low_rank(use_dora=use_dora)(load_tiny(dtype=dtype).backbone).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.fixture
def batch(make_samples: Callable[..., list[Encoded]]) -> Batch:
    return pack(make_samples((1, 0, 2)))


def embed(backbone: Backbone, batch: Batch) -> Tensor:
    with torch.no_grad():
        return backbone.embed(batch, backbone.layouts(POLICY)(batch))


@every_family
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_only_adapters_train_and_there_are_as_many_as_the_ranks_say(
    use_dora: bool, family: str, load_tiny: LoadTiny
) -> None:
    backbone = low_rank(use_dora=use_dora)(load_tiny().backbone)
    kinds = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
    assert all(any(kind in name for kind in kinds) for name in trained(backbone))
    layers = 2 * (TEXT + VISION[family])
    expected = sum(2 * (fan_in + fan_out) + use_dora * fan_out for fan_in, fan_out in layers)
    assert sum(p.numel() for p in trained(backbone).values()) == expected
    assert trainable_line(backbone).startswith(f"{expected:,} of ")


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_float32_on_a_bfloat16_model(use_dora: bool, load_tiny: LoadTiny) -> None:
    backbone = low_rank(use_dora=use_dora)(load_tiny(dtype="bfloat16").backbone)
    adapters = trained(backbone)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    frozen = [p for name, p in backbone.named_parameters() if name not in adapters]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_new_adapters_change_nothing_until_they_train(
    use_dora: bool, load_tiny: LoadTiny, loaded: Loaded, batch: Batch
) -> None:
    backbone = low_rank(use_dora=use_dora)(load_tiny().backbone).eval()
    torch.testing.assert_close(
        embed(backbone, batch), embed(loaded.backbone, batch), rtol=0, atol=1e-5
    )


@every_family
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_every_adapter_gets_a_gradient(use_dora: bool, load_tiny: LoadTiny, batch: Batch) -> None:
    backbone = adapted(load_tiny, use_dora=use_dora).train()
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    (backbone.embed(batch, backbone.layouts(POLICY)(batch)) * weight).sum().backward()
    untouched = [name for name, p in trained(backbone).items() if not p.grad.any()]  # type: ignore[union-attr]
    assert untouched == []
    assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)


@every_family
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_model_embeds_alike_and_the_original_stays(
    use_dora: bool, load_tiny: LoadTiny, loaded: Loaded, batch: Batch
) -> None:
    backbone = adapted(load_tiny, use_dora=use_dora)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = embed(backbone, batch)
    plain = merged(backbone)
    torch.testing.assert_close(embed(plain, batch), before, rtol=0, atol=1e-5)
    assert (before - embed(loaded.backbone, batch)).abs().max() > 1e-2
    assert set(plain.state_dict()) == set(loaded.backbone.state_dict())
    assert torch.equal(embed(backbone, batch), before)
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in state.items())


def test_model_without_adapters_is_merged_already(loaded: Loaded) -> None:
    assert merged(loaded.backbone) is loaded.backbone


def test_adapters_that_never_trained_are_told_from_those_of_an_unused_part(
    load_tiny: LoadTiny, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = low_rank(use_dora=True)(load_tiny().backbone).state_dict()
    names = sorted(name for name in fresh if ".lora_B." in name)
    with pytest.raises(UserError, match="FILE was never trained: all lora_B are zero"):
        check_trained(fresh, where="FILE")
    state = adapted(load_tiny, use_dora=True).state_dict()
    check_trained(state, where="FILE")
    assert not caplog.text
    state[names[3]] = torch.zeros_like(state[names[3]])
    check_trained(state, where="FILE")
    assert f"FILE: 1 of {len(names)} lora_B are zero, first {names[3]}" in caplog.text


@pytest.mark.parametrize("targets", [[*TARGETS, r".*\.no_such_layer"], [TARGETS[0].rstrip("j")]])
def test_expression_that_matches_nothing_is_refused(
    targets: list[str], load_tiny: LoadTiny
) -> None:
    with pytest.raises(UserError, match=r"adapter.target_modules: .* matches no module"):
        low_rank(use_dora=False, targets=targets)(load_tiny().backbone)


@cache
def adapter_file(name: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[f"adapter={name}"]).adapter


@every_family
@pytest.mark.parametrize("name", ["dora", "lora", "none"])
def test_adapter_files_fit_the_model(name: str, family: str, load_tiny: LoadTiny) -> None:
    adapter: Any = instantiate(adapter_file(name), _convert_="all")
    backbone = adapter(load_tiny().backbone)
    if isinstance(adapter, FullTuning):
        assert all(p.requires_grad for p in backbone.parameters())
        return
    layers = 2 * (TEXT + VISION[family])
    expected = sum(8 * (a + b) + (name == "dora") * b for a, b in layers)
    assert sum(p.numel() for p in trained(backbone).values()) == expected
    assert backbone.model.peft_config["default"].lora_alpha == 64
